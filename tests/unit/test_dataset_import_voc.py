"""Importing VOC: 1-based boxes to bins, broken annotations reported and left out, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import read_dataset
from rollstream.datasets.importing import describe_summary, import_dataset
from tests.builders.datasets import tree_bytes, write_picture, write_voc

GOOD = ("RBC", 5, 7, 30, 40)


def test_boxes_counted_from_one_become_bins_of_pixel_centres(tmp_path: Path) -> None:
    source = write_voc(
        tmp_path / "voc", {"a": [("WBC", 1, 1, 64, 48), ("RBC", 5, 7, 30, 40)]}, {"train": ["a"]}
    )

    summary = import_dataset("voc", source, tmp_path / "out")

    (sample,) = read_dataset(tmp_path / "out" / "train.jsonl", check_images=True)
    assert [(item.desc, item.bins) for item in sample.objects] == [
        ("WBC", (0, 0, 999, 999)),
        # 999 * 4 / 63, 999 * 6 / 47, 999 * 29 / 63, 999 * 39 / 47
        ("RBC", (63, 128, 460, 829)),
    ]
    assert sample.sample_id == "a"
    assert summary.problems == ()
    assert (summary.splits["train"].num_images, summary.splits["train"].num_objects) == (1, 2)


def test_split_files_decide_and_without_them_the_seed_does(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(10)]
    objects = {name: [GOOD] for name in names}
    listed = write_voc(
        tmp_path / "listed", objects, {"train": names[:5], "val": names[5:7], "test": names[7:9]}
    )
    bare = write_voc(tmp_path / "bare", objects)

    summary = import_dataset("voc", listed, tmp_path / "out")
    first, again = (import_dataset("voc", bare, tmp_path / name, seed=1) for name in ("one", "two"))

    counts = {split: count.num_images for split, count in summary.splits.items()}
    assert counts == {"train": 5, "val": 2, "test": 2}
    assert {split: count.num_images for split, count in first.splits.items()} == {"train": 9, "val": 1}
    assert tree_bytes(first.folder) == tree_bytes(again.folder)


BROKEN_BOXES = [
    (("RBC", 9, 7, 9, 40), "degenerate"),
    (("RBC", 30, 7, 5, 40), "degenerate"),
    (("RBC", 70, 7, 90, 40), "out of bounds"),
    (("RBC", -20, 7, -10, 40), "out of bounds"),
    ((" ", 5, 7, 30, 40), "label"),
    (("a<|im_end|>", 5, 7, 30, 40), "label"),
]


@pytest.mark.req("M-11")
@pytest.mark.parametrize("broken, kind", BROKEN_BOXES, ids=[str(box) for box, _ in BROKEN_BOXES])
def test_a_broken_object_is_reported_by_file_and_object_and_left_out(
    tmp_path: Path, broken: tuple[str, int, int, int, int], kind: str
) -> None:
    escaped = (broken[0].replace("<", "&lt;"), *broken[1:])
    source = write_voc(tmp_path / "voc", {"a": [GOOD, escaped]}, {"train": ["a"]})

    summary = import_dataset("voc", source, tmp_path / "out")

    (problem,) = summary.problems
    assert problem.kind == kind
    assert problem.file == str(source / "Annotations" / "a.xml")
    assert "object 2" in problem.item
    assert summary.num_objects_left_out == 1
    assert [item.desc for item in read_dataset(tmp_path / "out" / "train.jsonl")[0].objects] == ["RBC"]
    assert f"1 x {kind}" in describe_summary(summary)


def test_every_way_an_image_can_be_unusable_is_reported_and_the_rest_is_imported(tmp_path: Path) -> None:
    names = ["good", "gone", "half", "wide", "text", "xml", "empty", "all_broken"]
    objects = {name: [GOOD] for name in names} | {"empty": [], "all_broken": [("RBC", 9, 9, 9, 9)]}
    source = write_voc(tmp_path / "voc", objects, {"train": [*names, "unlisted", "good"]})
    pictures = source / "JPEGImages"
    (pictures / "gone.jpg").unlink()
    (pictures / "half.jpg").write_bytes((pictures / "half.jpg").read_bytes()[:300])
    write_picture(pictures / "wide.jpg", 65, 48)
    (pictures / "text.jpg").write_bytes(b"not a picture")
    (source / "Annotations" / "xml.xml").write_text("<annotation>")

    summary = import_dataset("voc", source, tmp_path / "out")

    kinds = {problem.file.split("/")[-1].removesuffix(".xml"): problem.kind for problem in summary.problems}
    assert kinds == {
        "gone": "no image",
        "half": "broken image",
        "wide": "size mismatch",
        "text": "broken image",
        "xml": "unreadable annotation",
        "all_broken": "degenerate",
        "unlisted": "no annotation",
        "good": "duplicate",
    }
    samples = read_dataset(tmp_path / "out" / "train.jsonl", check_images=True)
    assert [sample.sample_id for sample in samples] == ["good", "empty"]
    assert summary.num_images_left_out == 8
    # one each of gone, half, wide, text, all_broken and the second good; nobody knows those of the others
    assert (summary.num_objects_left_out, summary.num_objects_of_left_out_images) == (6, 6)


def test_a_split_file_cannot_name_an_annotation_outside_the_folder(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [GOOD]}, {"train": ["a", "../../secret"]})

    (problem,) = import_dataset("voc", source, tmp_path / "out").problems

    assert problem.kind == "name"
    assert "train.txt: got '../../secret'" in problem.reason


def test_strict_refuses_every_problem_and_writes_nothing(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [GOOD, ("RBC", 9, 7, 9, 40)]}, {"train": ["a"]})
    before = os.listdir(tmp_path)

    with pytest.raises(DataError, match=r"1 problems; nothing was written\n.*\n.*a\.xml: object 2"):
        import_dataset("voc", source, tmp_path / "out", strict=True)

    assert os.listdir(tmp_path) == before


def test_nothing_usable_a_wrong_path_and_a_wrong_kind_are_refused_with_a_remedy(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 9, 9, 9)]}, {"train": ["a"]})
    before = sorted(os.listdir(tmp_path))

    with pytest.raises(DataError, match="no usable image among broken annotations"):
        import_dataset("voc", source, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere: no such folder, expected a voc data set; check the path"):
        import_dataset("voc", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match=r"no \*\.xml in it, expected a VOC folder"):
        import_dataset("voc", source / "JPEGImages", tmp_path / "out")
    with pytest.raises(DataError, match="got kind 'csv', expected one of voc, coco, labelme"):
        import_dataset("csv", source, tmp_path / "out")  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == before


def test_a_destination_of_someone_else_is_refused_and_our_own_is_replaced(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [GOOD]}, {"train": ["a"]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")

    with pytest.raises(DataError, match="mine: got something that 'rollstream data import' did not make"):
        import_dataset("voc", source, tmp_path / "mine")
    first = tree_bytes(import_dataset("voc", source, tmp_path / "out").folder)
    second = tree_bytes(import_dataset("voc", source, tmp_path / "out").folder)

    assert first == second
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_images_are_copied_or_linked_and_the_folder_stands_alone(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [GOOD]}, {"train": ["a"]})
    copied = import_dataset("voc", source, tmp_path / "copied").folder / "images" / "a.jpg"
    linked = import_dataset("voc", source, tmp_path / "linked", link_images=True).folder / "images" / "a.jpg"

    assert linked.samefile(source / "JPEGImages" / "a.jpg")
    assert not copied.samefile(source / "JPEGImages" / "a.jpg")
    shutil.rmtree(source)
    for folder in ("copied", "linked"):
        assert len(read_dataset(tmp_path / folder / "train.jsonl", check_images=True)) == 1


def test_progress_counts_every_image(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [GOOD], "b": [GOOD]}, {"train": ["a", "b"]})
    seen: list[tuple[int, int]] = []

    import_dataset("voc", source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))

    assert seen == [(1, 2), (2, 2)]
