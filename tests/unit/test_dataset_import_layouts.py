"""Importing takes what tools write: any names, YOLO, grounding lines, turned pictures and deep ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import open_image
from rollstream.commands.program import app
from rollstream.datasets.importing import import_dataset
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.datasets import write_coco, write_labelme, write_picture, write_voc

BOX = (127, 128, 444, 383)


def samples(folder: Path) -> dict[str, list[Sample]]:
    return {
        file.stem: read_dataset(file, check_images=True, ordering="dataset")
        for file in sorted(folder.glob("*.jsonl"))
    }


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.req("D-1")
def test_voc_in_folders_of_any_name_with_subfolders_and_back_slashes(tmp_path: Path) -> None:
    plain = write_voc(tmp_path / "plain", {"a": [("RBC", 9, 7, 29, 19)], "b": [("RBC", 9, 7, 29, 19)]})
    (plain / "Annotations" / "day 1").mkdir()
    (plain / "JPEGImages" / "day 1").mkdir()
    shutil.move(plain / "Annotations" / "b.xml", plain / "Annotations" / "day 1" / "b.xml")
    shutil.move(plain / "JPEGImages" / "b.jpg", plain / "JPEGImages" / "day 1" / "b.jpg")
    shutil.move(plain / "Annotations", plain / "labels")
    shutil.move(plain / "JPEGImages", plain / "photos")
    file = plain / "labels" / "day 1" / "b.xml"
    file.write_text(file.read_text().replace("b.jpg", "C:\\Users\\me\\photos\\day 1\\b.jpg"))

    summary = import_dataset("voc", plain, tmp_path / "out", val_share=0)

    (train,) = samples(tmp_path / "out").values()
    assert summary.problems == ()
    assert sorted(item.objects[0].bins for item in train) == [BOX, BOX]
    paths = [path for item in train for path in item.image_paths]
    assert sorted(paths) == ["images/a.jpg", "images/day 1/b.jpg"]


@pytest.mark.req("D-1", "U-1")
def test_the_folder_of_annotations_itself_is_enough(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 7, 29, 19)]}, {"train": ["a"]})

    import_dataset("voc", source / "Annotations", tmp_path / "out")

    assert [item.sample_id for item in samples(tmp_path / "out")["train"]] == ["a"]


@pytest.mark.req("D-1")
def test_voc_pictures_beside_their_annotations_are_split_by_folder_names(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        made = write_voc(tmp_path / split, {f"{split}-1": [("RBC", 9, 7, 29, 19)]})
        (tmp_path / "all" / split).mkdir(parents=True)
        for file in [*made.rglob("*.xml"), *made.rglob("*.jpg")]:
            shutil.move(file, tmp_path / "all" / split / file.name)

    import_dataset("voc", tmp_path / "all", tmp_path / "out")

    assert {split: len(found) for split, found in samples(tmp_path / "out").items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }


def coco_content(names: list[str]) -> dict[str, Any]:
    return {
        "images": [
            {"id": number, "file_name": name, "width": 64, "height": 48} for number, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 6, 20, 12]}
            for number in range(len(names))
        ],
    }


@pytest.mark.req("D-1")
def test_coco_as_roboflow_writes_it_a_file_in_each_split_s_folder(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_picture(tmp_path / "src" / split / f"{split}.png")
        write(tmp_path / "src" / split / "_annotations.coco.json", json.dumps(coco_content([f"{split}.png"])))

    import_dataset("coco", tmp_path / "src", tmp_path / "out")

    found = samples(tmp_path / "out")
    assert {split: [item.sample_id for item in items] for split, items in found.items()} == {
        "train": ["train"],
        "val": ["valid"],
    }


@pytest.mark.req("D-1")
@pytest.mark.parametrize("stated", ["images\\p3.png", "/data/upload/1/p3.png", "p3.png", "default/p3.png"])
def test_coco_in_one_file_of_any_name_is_split_by_share_and_seed(tmp_path: Path, stated: str) -> None:
    names = [f"p{number}.png" for number in range(10)]
    for name in names:
        write_picture(tmp_path / "src" / "images" / "default" / name)
    names[3] = stated
    write(tmp_path / "src" / "annotations" / "result.json", json.dumps(coco_content(names)))
    write(tmp_path / "src" / "settings.json", "{}")

    for share, expected in ((0.3, {"train": 7, "val": 3}), (0.0, {"train": 10})):
        summary = import_dataset("coco", tmp_path / "src", tmp_path / "out", val_share=share, seed=3)
        assert {split: count.num_images for split, count in summary.splits.items()} == expected
        assert summary.problems == ()
    by_file = import_dataset(
        "coco", tmp_path / "src" / "annotations" / "result.json", tmp_path / "other", val_share=0.3, seed=3
    )
    assert {split: count.num_images for split, count in by_file.splits.items()} == {"train": 7, "val": 3}


@pytest.mark.req("D-1")
def test_lvis_names_its_pictures_by_address(tmp_path: Path) -> None:
    write_picture(tmp_path / "src" / "train2017" / "000001.png")
    content = coco_content(["x"])
    content["images"][0] = {
        "id": 0,
        "coco_url": "http://images.cocodataset.org/train2017/000001.png",
        "width": 64,
        "height": 48,
    }
    write(tmp_path / "src" / "lvis_v1_train.json", json.dumps(content))

    import_dataset("coco", tmp_path / "src", tmp_path / "out")

    assert [item.sample_id for item in samples(tmp_path / "out")["train"]] == ["000001"]


PIXELS = [{"bbox_2d": [8, 6, 28, 18], "label": "cup"}]
THOUSANDTHS = [{"bbox_2d": [125, 125, 437.5, 375], "label": "cup"}]
LINES = {
    "objects": lambda found: {"image": "p.png", "objects": found},
    "conversations": lambda found: {
        "image": "p.png",
        "conversations": [
            {"from": "human", "value": "<image>\nFind every cup."},
            {"from": "gpt", "value": f"```json\n{json.dumps(found)}\n```"},
        ],
    },
    "messages": lambda found: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "file://p.png"}]},
            {"role": "assistant", "content": [{"type": "text", "text": json.dumps(found)}]},
        ]
    },
    "ref and bbox": lambda found: {
        "images": ["p.png"],
        "objects": {"ref": ["cup"], "bbox": [found[0]["bbox_2d"]]},
    },
    "tags": lambda found: {
        "images": ["p.png"],
        "messages": [
            {
                "role": "assistant",
                "content": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>"
                "({},{}),({},{})<|box_end|>".format(*found[0]["bbox_2d"]),
            }
        ],
    },
}


@pytest.mark.req("D-1")
@pytest.mark.parametrize("spelling", LINES)
@pytest.mark.parametrize("found", [PIXELS, THOUSANDTHS], ids=["pixels", "thousandths"])
def test_grounding_lines_in_pixels_or_thousandths(
    tmp_path: Path, spelling: str, found: list[dict[str, Any]]
) -> None:
    write_picture(tmp_path / "src" / "p.png")
    file = write(tmp_path / "src" / "ground.jsonl", json.dumps(LINES[spelling](found)) + "\n{torn\n[]\n")

    summary = import_dataset("qwen", file, tmp_path / "out")

    (sample,) = samples(tmp_path / "out")["train"]
    assert [(item.desc, item.bins) for item in sample.objects] == [("cup", BOX)]
    assert summary.num_images_left_out == 2


@pytest.mark.req("D-1")
def test_what_the_numbers_of_grounding_lines_are_can_be_told(tmp_path: Path) -> None:
    write_picture(tmp_path / "src" / "p.png")
    line = {"image": "p.png", "objects": [{"bbox_2d": [10, 10, 40, 40], "label": "cup"}]}
    write(tmp_path / "src" / "train.jsonl", json.dumps(line))

    guessed = import_dataset("qwen", tmp_path / "src", tmp_path / "out")
    told = import_dataset("qwen", tmp_path / "src", tmp_path / "told", coordinates="thousandths")

    assert "taken for pixels" in guessed.notes[0]
    assert "thousandths, as asked" in told.notes[0]
    assert samples(tmp_path / "told")["train"][0].objects[0].bins == (10, 10, 41, 41)


def marked_picture(file: Path, orientation: int) -> None:
    """Write a JPEG that shows a white patch at (8, 6) to (28, 18) of 64x48 when it is turned upright."""
    shown = Image.new("RGB", (64, 48), (0, 0, 0))
    shown.paste((255, 255, 255), (8, 6, 28, 18))
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = shown.transpose(back) if back is not None else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    stored.save(file, exif=exif, quality=100, subsampling=0)


@pytest.mark.req("D-2")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_written_upright_and_its_boxes_fit(tmp_path: Path, orientation: int) -> None:
    source = write_coco(tmp_path / "coco", [{}])
    content = coco_content(["one.jpg"])
    marked_picture(source / "train2017" / "one.jpg", orientation)
    write(source / "annotations" / "instances_train2017.json", json.dumps(content))

    summary = import_dataset("coco", source, tmp_path / "out")

    (sample,) = samples(tmp_path / "out")["train"]
    assert (sample.width, sample.height, sample.objects[0].bins) == (64, 48, BOX)
    pixels = np.asarray(open_image(sample.image_files[0]).convert("L"))
    assert pixels[7:17, 9:27].min() > 200 > 50 > pixels[20:, 30:].max()
    assert summary.changes.get("pictures turned upright", 0) == (orientation != 1)


@pytest.mark.req("D-2")
@pytest.mark.parametrize(
    "orientation, box",
    [(6, [6, 36, 12, 20]), (8, [30, 8, 12, 20]), (5, [6, 8, 12, 20]), (7, [30, 36, 12, 20])],
)
def test_boxes_counted_on_the_stored_picture_are_turned_with_it(
    tmp_path: Path, orientation: int, box: list[int]
) -> None:
    source = write_coco(tmp_path / "coco", [{}])
    content = coco_content(["one.jpg"])
    content["images"][0] |= {"width": 48, "height": 64}
    content["annotations"][0]["bbox"] = box
    marked_picture(source / "train2017" / "one.jpg", orientation)
    write(source / "annotations" / "instances_train2017.json", json.dumps(content))

    import_dataset("coco", source, tmp_path / "out")

    (sample,) = samples(tmp_path / "out")["train"]
    assert (sample.width, sample.height, sample.objects[0].bins) == (64, 48, BOX)


@pytest.mark.req("D-2")
@pytest.mark.parametrize("largest", [4095, 65535])
def test_a_picture_of_16_bits_is_scaled_not_cut_off(tmp_path: Path, largest: int) -> None:
    ramp = np.linspace(0, largest, 64, dtype=np.uint16)[None, :].repeat(48, axis=0)
    write_labelme(tmp_path / "src", "a", [{"points": [[8, 6], [8, 18], [28, 6]]}])
    Image.fromarray(ramp).save(tmp_path / "src" / "a.png")

    summary = import_dataset("labelme", tmp_path / "src", tmp_path / "out")

    (sample,) = samples(tmp_path / "out")["train"]
    with Image.open(sample.image_files[0]) as stored:
        assert stored.mode == "RGB"
    pixels = np.asarray(open_image(sample.image_files[0]))[0, :, 0]
    assert np.abs(pixels.astype(float) - np.linspace(0, 255, 64)).max() <= 1
    assert summary.changes["pictures scaled to 8 bits"] == 1


@pytest.mark.req("D-1")
def test_a_split_by_folder_keeps_folders_whole(tmp_path: Path) -> None:
    for folder in range(6):
        for number in range(4):
            write_labelme(
                tmp_path / "src" / f"video{folder}", f"f{number}", [{"points": [[8, 6], [8, 18], [28, 6]]}]
            )

    import_dataset("labelme", tmp_path / "src", tmp_path / "out", val_share=0.3, group_by="folder", seed=5)

    found = samples(tmp_path / "out")
    folders = {split: {item.sample_id.split("/")[0] for item in items} for split, items in found.items()}
    assert not folders["train"] & folders["val"]
    assert (len(found["train"]), len(found["val"])) == (16, 8)


@pytest.mark.req("D-1")
def test_splits_of_the_source_can_be_set_aside(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(10)]
    source = write_voc(tmp_path / "voc", {name: [("RBC", 9, 7, 29, 19)] for name in names}, {"train": names})

    own = import_dataset("voc", source, tmp_path / "own")
    again = import_dataset("voc", source, tmp_path / "again", resplit=True, val_share=0.2)

    assert list(own.splits) == ["train"]
    assert {split: count.num_images for split, count in again.splits.items()} == {"train": 8, "val": 2}


@pytest.mark.req("D-1", "U-2")
def test_the_command_takes_every_option_and_ends_with_a_table(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 7, 29, 19)], "b": [("WBC", 0, 7, 29, 19)]})
    options = ["--val-share", "0.5", "--seed", "3", "--link", "--base", "1", "--masks", "box"]
    options += ["--group-by", "file", "--simplify", "2", "--model", str(SHIPPED_MODEL)]

    done = CliRunner().invoke(app, ["data", "import", "voc", str(source), str(tmp_path / "out"), *options])

    assert done.exit_code == 0, done.output
    for words in (
        "train: 1 images",
        "val: 1 images",
        "RBC",
        "WBC",
        "clipped: 1",
        "left out: 0 images",
        "longest sample: ",
    ):
        assert words in done.output


def test_a_destination_inside_the_source_is_refused(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 7, 29, 19)]})
    with pytest.raises(DataError, match="lies inside the source"):
        import_dataset("voc", source, source / "out")


@pytest.mark.req("U-2")
def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 7, 29, 19)]})
    write(tmp_path / "file", "in the way")
    with pytest.raises(DataError, match="cannot be written .*choose another folder"):
        import_dataset("voc", source, tmp_path / "file" / "out")
