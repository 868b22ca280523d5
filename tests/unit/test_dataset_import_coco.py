"""Importing COCO: boxes, polygons and masks to bins, crowds and broken annotations left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import read_dataset
from rollstream.datasets.importing import import_dataset
from tests.builders.datasets import write_coco, write_picture

TRIANGLE = [8.0, 6.0, 8.0, 18.0, 28.0, 6.0, 8.0, 6.0]
MASK = {"counts": "abc", "size": [48, 64]}


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_box_becomes_its_corners_and_a_polygon_its_canonical_spelling(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "coco", [{}, {"segmentation": [TRIANGLE]}])

    summary = import_dataset("coco", source, tmp_path / "out")

    (sample,) = read_dataset(tmp_path / "out" / "train.jsonl", check_images=True, ordering="dataset")
    assert [(item.desc, item.geometry, item.bins) for item in sample.objects] == [
        # 999 * 8 / 63, 999 * 6 / 47, 999 * 28 / 63, 999 * 18 / 47
        ("cup", "bbox_2d", (127, 128, 444, 383)),
        ("cup", "poly", (127, 128, 444, 128, 127, 383)),
    ]
    assert sample.image_paths == ("images/train/one.png",)
    assert list(summary.splits) == ["train"]


def test_edges_counted_past_the_last_pixel_are_the_border(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "coco", [{"bbox": [0, 0, 64, 48]}])

    import_dataset("coco", source, tmp_path / "out")

    assert read_dataset(tmp_path / "out" / "train.jsonl")[0].objects[0].bins == (0, 0, 999, 999)


BROKEN = [
    ({"iscrowd": 1, "segmentation": MASK}, "crowd"),
    ({"category_id": 8}, "label"),
    ({"bbox": [8, 6, 20]}, "no box"),
    ({"bbox": None}, "no box"),
    ({"bbox": [8, 6, "wide", 12]}, "no number"),
    ({"bbox": [8, 6, float("nan"), 12]}, "no number"),
    ({"bbox": [8, 6, 0, 12]}, "degenerate"),
    ({"bbox": [80, 6, 60, 12]}, "out of bounds"),
    ({"bbox": [-30, 6, 20, 12]}, "out of bounds"),
    ({"segmentation": [[1, 2, 3, 4]]}, "segmentation"),
    ({"segmentation": [[1, 1, 5, 5, 9, 9]]}, "degenerate"),
    ({"image_id": 77}, "no image"),
]


@pytest.mark.req("M-11")
@pytest.mark.parametrize("broken, kind", BROKEN, ids=[f"{kind} {broken}"[:40] for broken, kind in BROKEN])
def test_a_broken_annotation_is_reported_by_its_id_and_left_out(
    tmp_path: Path, broken: dict[str, Any], kind: str
) -> None:
    source = write_coco(tmp_path / "coco", [{}, broken])

    summary = import_dataset("coco", source, tmp_path / "out")

    assert [problem.kind for problem in summary.problems] == [kind]
    assert "annotation 2" in summary.problems[0].item
    assert len(read_dataset(tmp_path / "out" / "train.jsonl")[0].objects) == 1
    with pytest.raises(DataError, match="nothing was written"):
        import_dataset("coco", source, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("file_name", ["../../secret.png", "/etc/hosts", "gone.png", "", None])
def test_an_image_outside_or_missing_is_reported_and_left_out(tmp_path: Path, file_name: object) -> None:
    source = write_coco(tmp_path / "coco", [{}])
    write_picture(tmp_path / "secret.png")
    images = [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": file_name, "width": 64, "height": 48}]
    edit(source, images=images)

    summary = import_dataset("coco", source, tmp_path / "out")

    (problem,) = summary.problems
    assert problem.kind in {"image outside", "no image"}
    assert problem.item == "image 2"
    assert summary.num_images_left_out == 1
    assert not list((tmp_path / "out").rglob("secret*"))


def test_two_files_of_one_split_name_keep_their_years(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", [{}], split="train2014")
    source = write_coco(tmp_path / "coco", [{}], split="train2017")

    assert sorted(import_dataset("coco", source, tmp_path / "out").splits) == ["train2014", "train2017"]


@pytest.mark.parametrize(
    "text, expected",
    [("{broken", "not readable as JSON"), ("[]", "images is no list of maps"), ("{}", "images is no list")],
)
def test_a_file_that_is_no_coco_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    source = write_coco(tmp_path / "coco", [{}])
    (source / "annotations" / "instances_train2017.json").write_text(text)

    with pytest.raises(DataError, match=expected):
        import_dataset("coco", source, tmp_path / "out")
    with pytest.raises(DataError, match="no JSON with images and annotations in it, expected a COCO folder"):
        import_dataset("coco", source / "train2017", tmp_path / "out")
