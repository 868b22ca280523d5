"""Importing YOLO: boxes, segments, names and splits in the ways that its tools write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_schemas.errors import DataError
from rollstream.datasets.importing import import_dataset
from tests.builders.datasets import write_picture
from tests.unit.test_dataset_import_layouts import BOX, samples, write


@pytest.mark.req("D-1")
def test_yolo_boxes_and_segments_with_data_yaml(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write(source / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [cup, plate]\n")
    for split in ("train", "valid"):
        write_picture(source / split / "images" / f"{split}.png")
        write_picture(source / split / "images" / f"{split}-empty.png")
    write(source / "train" / "labels" / "train.txt", "0 0.28125 0.25 0.3125 0.25\n\n")
    write(
        source / "valid" / "labels" / "valid.txt",
        "1 0.125 0.125 0.4375 0.125 0.125 0.375\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5\n0 nan 0.5 0.1 0.1\n",
    )

    summary = import_dataset("yolo", source, tmp_path / "out")

    found = samples(tmp_path / "out")
    by_id = {item.sample_id: item for items in found.values() for item in items}
    (box,) = by_id["train/images/train"].objects
    (segment,) = by_id["valid/images/valid"].objects
    assert (box.desc, box.bins) == ("cup", BOX)
    assert (segment.desc, segment.bins) == ("plate", (127, 128, 444, 128, 127, 383))
    assert by_id["train/images/train-empty"].objects == ()
    assert {split: len(items) for split, items in found.items()} == {"train": 2, "val": 2}
    assert sorted(problem.kind for problem in summary.problems) == ["label", "no number", "segmentation"]


@pytest.mark.req("D-1")
@pytest.mark.req("D-1")
@pytest.mark.parametrize("val, expected", [("images/held", {"train": 2, "val": 1}), ("images", {"train": 3})])
def test_yolo_folders_of_splits_may_lie_in_one_another(
    val: str, expected: dict[str, int], tmp_path: Path
) -> None:
    source = tmp_path / "src"
    write(source / "data.yaml", f"train: images\nval: {val}\nnames: [cup]\n")
    for place in ("a", "b", "held/c"):
        write_picture(source / "images" / f"{place}.png")
        write(source / "labels" / f"{place}.txt", "0 0.28125 0.25 0.3125 0.25\n")
    import_dataset("yolo", source, tmp_path / "out")
    assert {split: len(items) for split, items in samples(tmp_path / "out").items()} == expected


def test_yolo_with_labels_beside_pictures_and_a_list_of_classes(tmp_path: Path) -> None:
    for number in range(4):
        write_picture(tmp_path / "src" / f"obj_train_data/p{number}.png")
        write(tmp_path / "src" / f"obj_train_data/p{number}.txt", "0 0.28125 0.25 0.3125 0.25")
    write(tmp_path / "src" / "obj.names", "cup\n")
    write(tmp_path / "src" / "train.txt", "data/obj_train_data/p0.png\ndata/obj_train_data/p1.png\n")
    write(tmp_path / "src" / "val.txt", "data/obj_train_data/p2.png\ndata/obj_train_data/p3.png\n")

    import_dataset("yolo", tmp_path / "src", tmp_path / "out")

    assert {split: len(items) for split, items in samples(tmp_path / "out").items()} == {"train": 2, "val": 2}


def test_yolo_without_names_or_labels_says_what_is_missing(tmp_path: Path) -> None:
    write_picture(tmp_path / "src" / "a.png")
    with pytest.raises(DataError, match=r"no class names, expected data\.yaml with names, or classes\.txt"):
        import_dataset("yolo", tmp_path / "src", tmp_path / "out")
    write(tmp_path / "src" / "classes.txt", "cup")
    with pytest.raises(DataError, match="no picture has a label file"):
        import_dataset("yolo", tmp_path / "src", tmp_path / "out")
