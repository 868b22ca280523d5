"""Importing labelme: polygons and rectangles to bins, a seeded split, broken shapes left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import read_dataset
from rollstream.datasets.importing import import_dataset
from tests.builders.datasets import tree_bytes, write_labelme, write_picture

POLYGON = {"points": [[8, 6], [8, 18], [28, 6]]}
RECTANGLE = {"shape_type": "rectangle", "points": [[28, 18], [8, 6]], "label": "box"}


def test_polygons_and_rectangles_become_canonical_bins(tmp_path: Path) -> None:
    write_labelme(tmp_path / "src", "a", [POLYGON, RECTANGLE])

    import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    (sample,) = read_dataset(tmp_path / "out" / "train.jsonl", check_images=True, ordering="dataset")
    assert [(item.desc, item.bins) for item in sample.objects] == [
        ("leaf", (127, 128, 444, 128, 127, 383)),
        ("box", (127, 128, 444, 383)),
    ]
    assert sample.task == "mixed"


def test_the_split_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    for number in range(20):
        write_labelme(tmp_path / "src", f"n{number}", [POLYGON])

    first, again, other = (
        import_dataset("labelme", tmp_path / "src", tmp_path / name, seed=seed)
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    )

    assert {split: count.num_images for split, count in first.splits.items()} == {"train": 18, "val": 2}
    assert tree_bytes(first.folder) == tree_bytes(again.folder)
    validation = [(folder / "val.jsonl").read_text() for folder in (first.folder, other.folder)]
    assert validation[0] != validation[1]


def test_images_in_subfolders_keep_apart_although_they_share_a_name(tmp_path: Path) -> None:
    write_labelme(tmp_path / "src" / "x", "a", [POLYGON])
    write_labelme(tmp_path / "src" / "y", "a", [POLYGON])

    import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    assert (tmp_path / "out" / "images" / "x" / "a.png").is_file()
    assert (tmp_path / "out" / "images" / "y" / "a.png").is_file()


@pytest.mark.req("M-11")
@pytest.mark.parametrize(
    "broken, kind",
    [
        ({"shape_type": "line", "points": [[8, 6], [9, 9]]}, "shape type"),
        ({"shape_type": "mask", "points": [[8, 6], [9, 9]], "mask": "not a picture"}, "mask"),
        ({"points": [[8, 6], [9, 9]]}, "shape type"),
        ({"points": "none"}, "no points"),
        ({"points": [[8, 6], [9], [3, 3]]}, "no points"),
        ({"points": [[8, 6], [9, "x"], [3, 3]]}, "no number"),
        ({"label": "", **POLYGON}, "label"),
        ({"label": None, **POLYGON}, "label"),
        ({"points": [[80, 6], [90, 6], [80, 18]]}, "out of bounds"),
        ({"points": [[8, 6], [9, 6], [10, 6]]}, "degenerate"),
    ],
)
def test_a_broken_shape_is_reported_by_number_and_left_out(
    tmp_path: Path, broken: dict[str, Any], kind: str
) -> None:
    file = write_labelme(tmp_path / "src", "a", [POLYGON, broken])

    summary = import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    (problem,) = summary.problems
    assert (problem.kind, problem.file) == (kind, str(file))
    assert "shape 2" in problem.item
    assert summary.num_objects_left_out == 1


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"imagePath": "../secret.png"}, "image outside"),
        ({"imagePath": "gone.png"}, "no image"),
        ({"imagePath": "gone.png", "imageData": "bm8gcGljdHVyZQ=="}, "broken image"),
        ({"imagePath": None}, "no image"),
        ({"imageWidth": 65}, "size mismatch"),
        ({"shapes": 3}, "unreadable annotation"),
    ],
)
def test_an_image_that_cannot_be_used_is_reported_and_left_out(
    tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    write_picture(tmp_path / "secret.png")
    write_labelme(tmp_path / "src", "good", [POLYGON])
    write_labelme(tmp_path / "src", "bad", **({"shapes": [POLYGON]} | changes))
    (tmp_path / "src" / "settings.json").write_text('{"colour": "red"}')

    summary = import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    assert [problem.kind for problem in summary.problems] == [kind]
    assert summary.num_images_left_out == 1


def test_a_broken_json_is_reported_and_a_folder_without_labelme_refused(tmp_path: Path) -> None:
    write_labelme(tmp_path / "src", "good", [POLYGON])
    (tmp_path / "src" / "torn.json").write_text('{"shapes": [')
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "settings.json").write_text("{}")

    summary = import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    assert [problem.kind for problem in summary.problems] == ["unreadable annotation"]
    with pytest.raises(DataError, match="no labelme file"):
        import_dataset("labelme", tmp_path / "none", tmp_path / "out")
