"""Data set lines: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import order_objects, read_dataset
from broker_schemas.records.records import GroundTruthObject
from tests.builders.datasets import BOX, POLYGON, dataset_line, write_jsonl, write_picture


def box(left: int, top: int, desc: str = "a") -> GroundTruthObject:
    return GroundTruthObject(desc=desc, geometry="bbox_2d", bins=(left, top, left + 10, top + 10))


def test_a_valid_line_becomes_a_sample_with_paths_resolved_against_the_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [dataset_line(objects=[BOX, POLYGON]), ""])

    (sample,) = read_dataset(file)

    assert sample.sample_id == "train-1"
    assert sample.task == "mixed"
    assert sample.image_paths == ("images/one.png",)
    assert sample.image_files == (tmp_path / "images" / "one.png",)
    assert (sample.width, sample.height) == (64, 48)
    assert {item.geometry: item.bins for item in sample.objects} == {
        "bbox_2d": (10, 20, 300, 400),
        "poly": (100, 10, 300, 200, 50, 400),
    }


def test_coordinate_tokens_read_as_the_bins_they_name(tmp_path: Path) -> None:
    tokens = ["<|coord_0|>", 7, "<|coord_999|>", "<|coord_8|>"]
    file = write_jsonl(tmp_path / "d.jsonl", [dataset_line(objects=[{"desc": "é", "bbox_2d": tokens}])])

    assert read_dataset(file)[0].objects[0].bins == (0, 7, 999, 8)


def test_metadata_names_sample_and_task_else_line_and_geometry_do(tmp_path: Path) -> None:
    named = dataset_line(metadata={"sample_id": "s-9", "task": "cells"})
    lines = [named, "", dataset_line(objects=[POLYGON]), dataset_line(objects=[])]
    file = write_jsonl(tmp_path / "val.jsonl", lines)

    samples = read_dataset(file)

    assert [(sample.sample_id, sample.task) for sample in samples] == [
        ("s-9", "cells"),
        ("val-3", "poly"),
        ("val-4", "empty"),
    ]


def test_a_root_above_the_file_makes_image_paths_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    line = dataset_line(images=["../images/one.png"])
    file = write_jsonl(tmp_path / "splits" / "train.jsonl", [line])

    assert read_dataset(file, root=tmp_path)[0].image_paths == ("images/one.png",)
    with pytest.raises(DataError, match=r"images\[0\].*leaves the data root"):
        read_dataset(file)


def with_object(**fields: Any) -> dict[str, Any]:
    return dataset_line(objects=[BOX, fields])


BROKEN_LINES = [
    (dataset_line(images=...), "images: is missing"),
    (dataset_line(width=...), "width: is missing"),
    (dataset_line(height=0), "height: got 0"),
    (dataset_line(width=True), "width: got True"),
    (dataset_line(width=64.0), "width: got 64.0"),
    (dataset_line(objects=...), "objects: is missing"),
    (dataset_line(objects={}), "objects: got {}"),
    (dataset_line(images=[]), "images: got []"),
    (dataset_line(images="one.png"), "images: got 'one.png'"),
    (dataset_line(images=[3]), "images[0]: got 3"),
    (dataset_line(images=["../one.png"]), "images[0]: image path '../one.png': leaves the data root"),
    (dataset_line(images=["/etc/hosts"]), "images[0]: image path '/etc/hosts': leaves the data root"),
    (dataset_line(images=["a\0b"]), "leaves the data root"),
    (dataset_line(colour="red"), "colour: unknown field"),
    (dataset_line(metadata=[]), "metadata: got []"),
    (dataset_line(metadata={"sample_id": ""}), "metadata.sample_id: got ''"),
    (dataset_line(metadata={"task": 3}), "metadata.task: got 3"),
    ("{broken", "not JSON"),
    ("[1]", "got list, expected a JSON object"),
    (dataset_line(objects=["x"]), "objects[0]: got 'x'"),
    (with_object(bbox_2d=[1, 2, 3, 4]), "objects[1].desc: got None"),
    (with_object(desc=" ", bbox_2d=[1, 2, 3, 4]), "objects[1].desc: got ' '"),
    (with_object(desc="a\nb", bbox_2d=[1, 2, 3, 4]), "objects[1].desc: got 'a\\nb'"),
    (with_object(desc="x" * 1001, bbox_2d=[1, 2, 3, 4]), "objects[1].desc: got 1001 characters"),
    (with_object(desc="a<|im_end|>", bbox_2d=[1, 2, 3, 4]), "control token <|im_end|>"),
    ('{"images":["a"],"width":1,"height":1,"objects":[{"desc":"\\ud800","poly":[1]}]}', "lone surrogates"),
    (with_object(desc="a"), "objects[1]: got no geometry"),
    (with_object(desc="a", bbox_2d=[1, 2, 3, 4], poly=[1, 1, 9, 1, 9, 9]), "got bbox_2d and poly"),
    (with_object(desc="a", bbox_2d=[1, 2, 3, 4], score=1), "objects[1].score: unknown field"),
    (with_object(desc="a", bbox_2d=[1, 2, 3]), "objects[1].bbox_2d: got 3 values, expected 4"),
    (with_object(desc="a", bbox_2d=[5, 2, 5, 4]), "objects[1].bbox_2d: got [5, 2, 5, 4]"),
    (with_object(desc="a", bbox_2d=[1, 2, 3, 1000]), "objects[1].bbox_2d[3]: got 1000"),
    (with_object(desc="a", bbox_2d=[-1, 2, 3, 4]), "objects[1].bbox_2d[0]: got -1"),
    (with_object(desc="a", bbox_2d=[1.0, 2, 3, 4]), "objects[1].bbox_2d[0]: got 1.0"),
    (with_object(desc="a", bbox_2d=[True, 2, 3, 4]), "objects[1].bbox_2d[0]: got True"),
    (with_object(desc="a", bbox_2d=["7", 2, 3, 4]), "objects[1].bbox_2d[0]: got '7'"),
    (with_object(desc="a", bbox_2d=["<|coord_007|>", 2, 30, 4]), "got '<|coord_007|>'"),
    (with_object(desc="a", bbox_2d=["<|coord_*|>", 2, 30, 4]), "got '<|coord_*|>'"),
    (with_object(desc="a", bbox_2d=["<|coord_1000|>", 2, 30, 4]), "got '<|coord_1000|>'"),
    (with_object(desc="a", bbox_2d="1 2 3 4"), "objects[1].bbox_2d: got '1 2 3 4'"),
    (with_object(desc="a", poly=[1, 1, 9, 1]), "objects[1].poly: got 4 values"),
    (with_object(desc="a", poly=[1, 1, 9, 1, 9, 9, 5]), "objects[1].poly: got 7 values"),
    (with_object(desc="a", poly=[[1, 1], [9, 1], [9, 9]]), "objects[1].poly[0]: got [1, 1]"),
    (with_object(desc="a", poly=[1, 1, 9, 9, 9, 1]), "expected its canonical spelling [1, 1, 9, 1, 9, 9]"),
    (with_object(desc="a", poly=[1, 1, 5, 5, 9, 9]), "objects[1].poly: got a polygon without area"),
]


@pytest.mark.req("M-11")
@pytest.mark.parametrize("line, expected", BROKEN_LINES, ids=[expected[:40] for _, expected in BROKEN_LINES])
def test_a_broken_line_is_refused_with_file_line_and_field(
    tmp_path: Path, line: dict[str, Any] | str, expected: str
) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [dataset_line(), line])

    with pytest.raises(DataError) as refusal:
        read_dataset(file)

    assert f"{file}:2: " in str(refusal.value)
    assert expected in str(refusal.value)
    assert f"{file}:1: " not in str(refusal.value)


@pytest.mark.req("M-11")
def test_all_broken_lines_stand_in_one_report_up_to_twenty(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [dataset_line(width=...)] * 23)

    with pytest.raises(DataError) as refusal:
        read_dataset(file)

    assert "23 problems" in str(refusal.value)
    assert f"{file}:20: width" in str(refusal.value)
    assert f"{file}:21: width" not in str(refusal.value)
    assert "and 3 more" in str(refusal.value)


def test_a_sample_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [dataset_line(metadata={"sample_id": "s"})] * 2)

    with pytest.raises(DataError, match=r"d\.jsonl:2: metadata\.sample_id: got 's' again.*line 1"):
        read_dataset(file)


def test_a_missing_file_an_empty_one_and_foreign_bytes_are_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"images": "\xff"}')

    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read.*rollstream data import"):
        read_dataset(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: got no samples"):
        read_dataset(write_jsonl(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(DataError, match=r"latin\.jsonl: not UTF-8 at byte 12"):
        read_dataset(tmp_path / "latin.jsonl")


def test_checking_images_names_those_missing_broken_or_of_another_size(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "good.png")
    write_picture(tmp_path / "images" / "wide.png", width=65)
    (tmp_path / "images" / "text.png").write_text("no picture")
    names = ["good", "wide", "text", "gone"]
    lines = [dataset_line(images=[f"images/{name}.png"]) for name in names]
    file = write_jsonl(tmp_path / "d.jsonl", lines)

    assert len(read_dataset(file)) == 4
    with pytest.raises(DataError) as refusal:
        read_dataset(file, check_images=True)

    message = str(refusal.value)
    assert "3 problems" in message
    assert "good.png" not in message
    assert "wide.png has 65x48 pixels, expected width 64 and height 48" in message
    assert f"image {tmp_path / 'images' / 'text.png'}: cannot be opened" in message
    assert f"image {tmp_path / 'images' / 'gone.png'}: does not exist" in message


def test_sorted_order_goes_by_top_then_left_and_keeps_ties() -> None:
    low, right, left, twin = box(0, 50), box(60, 5), box(20, 5), box(20, 5, desc="b")
    polygon = GroundTruthObject(desc="p", geometry="poly", bins=(40, 2, 90, 80, 10, 70))

    assert order_objects([low, right, left, twin, polygon], "sorted") == (polygon, left, twin, right, low)
    assert order_objects([], "sorted") == ()


def test_random_order_depends_on_seed_and_sample_alone() -> None:
    objects = [box(left, 0) for left in range(0, 120, 10)]

    shuffled = order_objects(objects, "random", seed=3, sample_id="a")

    assert shuffled == order_objects(objects, "random", seed=3, sample_id="a")
    assert shuffled != order_objects(objects, "random", seed=4, sample_id="a")
    assert shuffled != order_objects(objects, "random", seed=3, sample_id="b")
    assert sorted(shuffled, key=lambda item: item.bins) == objects


def test_reading_applies_the_ordering_that_is_asked_for(tmp_path: Path) -> None:
    objects = [{"desc": "low", "bbox_2d": [1, 500, 9, 600]}, {"desc": "high", "bbox_2d": [1, 5, 9, 9]}]
    file = write_jsonl(tmp_path / "d.jsonl", [dataset_line(objects=objects)])

    assert [item.desc for item in read_dataset(file)[0].objects] == ["high", "low"]
    assert [item.desc for item in read_dataset(file, ordering="dataset")[0].objects] == ["low", "high"]
    with pytest.raises(DataError, match="object ordering: got 'upwards', expected one of sorted"):
        read_dataset(file, ordering="upwards")  # type: ignore[arg-type]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    line = json.dumps(dataset_line(metadata={"note": "a\u2028b"}), ensure_ascii=False)
    file = write_jsonl(tmp_path / "d.jsonl", [line])

    assert read_dataset(file)[0].metadata["note"] == "a\u2028b"
