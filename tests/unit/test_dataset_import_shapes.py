"""Importing keeps objects: overshoot clipped, masks and parts converted, polygons simplified, all counted."""

from __future__ import annotations

import base64
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.polygon import signed_doubled_area, vertices_of
from rollstream.datasets.importing import ImportSummary, describe_summary, import_dataset
from rollstream.datasets.importing.masks import bitmap_parts, decode_run_lengths
from rollstream.datasets.importing.polygons import join_polygons, signed_area, simplify_polygon
from tests.builders.datasets import write_coco, write_labelme, write_voc

TRIANGLE = [8.0, 6.0, 8.0, 18.0, 28.0, 6.0]
SECOND_PART = [30.0, 30.0, 40.0, 30.0, 40.0, 40.0]
SIZE = (64, 48)


def bitmap(*rectangles: tuple[int, int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a mask of 64x48 pixels that covers the rectangles (x1, y1, x2, y2), ends excluded."""
    pixels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    for x1, y1, x2, y2 in rectangles:
        pixels[y1:y2, x1:x2] = 1
    return pixels


def packed(pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return the mask as COCO's own tool packs it."""
    encoded = coco_mask.encode(np.asfortranarray(pixels))
    return {"counts": encoded["counts"].decode(), "size": [int(side) for side in encoded["size"]]}


def counted(pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return the mask as plain run lengths down the columns."""
    flat, runs, value = pixels.T.reshape(-1), [0], 0
    for pixel in flat.tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"counts": runs, "size": [pixels.shape[0], pixels.shape[1]]}


def imported(kind: Any, source: Path, tmp_path: Path, **options: Any) -> tuple[ImportSummary, list[Sample]]:
    summary = import_dataset(kind, source, tmp_path / "out", **options)
    return summary, read_dataset(tmp_path / "out" / "train.jsonl", check_images=True, ordering="dataset")


def area_in_bins(bins: tuple[int, ...]) -> float:
    return abs(signed_doubled_area(vertices_of(bins))) / 2


@pytest.mark.req("D-2")
@pytest.mark.parametrize(
    "box, bins",
    [
        ([10, 8, 54.5, 30], (159, 170, 999, 808)),  # half a pixel over on the right
        ([-3.5, -2, 20, 12], (0, 0, 262, 213)),
        ([-5, -5, 80, 80], (0, 0, 999, 999)),  # the whole image and more
    ],
)
def test_a_box_that_overshoots_is_clipped_and_counted(
    tmp_path: Path, box: list[float], bins: tuple[int, ...]
) -> None:
    source = write_coco(tmp_path / "coco", [{"bbox": box}])

    summary, (sample,) = imported("coco", source, tmp_path)

    assert [item.bins for item in sample.objects] == [bins]
    assert (summary.num_clipped, summary.num_objects_left_out, summary.problems) == (1, 0, ())
    assert "clipped: 1" in describe_summary(summary)


@pytest.mark.req("D-2")
def test_a_polygon_that_overshoots_by_a_fraction_keeps_its_shape_inside(tmp_path: Path) -> None:
    points = [[8.2, 6.1], [40.0, 10.0], [30.0, 48.385], [12.0, 40.0]]
    write_labelme(tmp_path / "src", "chair", [{"points": points}])

    summary, (sample,) = imported("labelme", tmp_path / "src", tmp_path)

    (item,) = sample.objects
    assert item.geometry == "poly"
    assert max(item.bins[1::2]) == 999
    assert summary.num_clipped == 1


@pytest.mark.req("D-2")
def test_a_voc_box_that_begins_at_0_in_a_set_counted_from_1_is_clipped(tmp_path: Path) -> None:
    source = write_voc(
        tmp_path / "voc", {"a": [("RBC", 0, 7, 30, 40), ("WBC", 1, 1, 64, 48)]}, {"train": ["a"]}
    )

    summary, (sample,) = imported("voc", source, tmp_path)

    assert [item.bins for item in sample.objects] == [(0, 128, 460, 829), (0, 0, 999, 999)]
    assert summary.num_clipped == 1


@pytest.mark.req("D-1")
def test_a_voc_set_counted_from_0_is_recognised_and_can_be_told(tmp_path: Path) -> None:
    objects = {"a": [("RBC", 0, 0, 63, 47), ("RBC", 0, 6, 29, 39)]}
    source = write_voc(tmp_path / "voc", objects, {"train": ["a"]})

    summary, (sample,) = imported("voc", source, tmp_path)
    told, (other,) = imported("voc", source, tmp_path, base=1)

    assert [item.bins for item in sample.objects] == [(0, 0, 999, 999), (0, 128, 460, 829)]
    assert (summary.num_clipped, told.num_clipped) == (0, 2)
    assert "pixels counted from 0" in summary.notes[0]
    assert other.objects[0].bins == (0, 0, 983, 978)


@pytest.mark.req("D-2")
def test_a_shape_thinner_than_a_bin_is_widened_to_one(tmp_path: Path) -> None:
    thin = [10.0, 10.0, 30.0, 10.0, 30.0, 10.01]
    source = write_coco(tmp_path / "coco", [{"bbox": [8, 6, 0.01, 12]}, {"segmentation": [thin]}])

    summary, (sample,) = imported("coco", source, tmp_path)

    assert [item.bins for item in sample.objects] == [(127, 128, 128, 383), (159, 213, 476, 214)]
    assert summary.num_objects_left_out == 0
    assert summary.changes == {"widened": 1, "polygon thinner than a bin to its box": 1}


@pytest.mark.req("D-1", "D-2")
@pytest.mark.parametrize("spelling", [packed, counted])
@pytest.mark.parametrize(
    "masks, expected",
    [
        ("outline", (159, 128, 317, 128, 317, 425, 159, 425)),
        ("hull", (159, 128, 317, 128, 317, 425, 159, 425)),
        ("box", (159, 128, 317, 425)),
    ],
)
def test_a_run_length_mask_becomes_what_is_asked(
    tmp_path: Path, spelling: Any, masks: str, expected: tuple[int, ...]
) -> None:
    source = write_coco(tmp_path / "coco", [{"segmentation": spelling(bitmap((10, 6, 20, 20)))}])

    summary, (sample,) = imported("coco", source, tmp_path, masks=masks)

    assert sample.objects[0].bins == expected
    assert summary.changes == {f"mask to {masks}": 1}
    assert summary.num_converted == 1


@pytest.mark.req("D-1", "D-2")
def test_an_object_of_several_parts_is_one_outline_of_their_whole_area(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "coco", [{"segmentation": [TRIANGLE, SECOND_PART]}])

    areas = {}
    for masks in ("outline", "hull", "box"):
        summary, (sample,) = imported("coco", source, tmp_path, masks=masks)
        assert summary.changes == {f"several parts to {masks}": 1}
        areas[masks] = sample.objects[0]

    per_pixel = 999 / 63 * 999 / 47
    assert area_in_bins(areas["outline"].bins) == pytest.approx((120 + 50) * per_pixel, rel=0.02)
    assert area_in_bins(areas["hull"].bins) > 1.5 * area_in_bins(areas["outline"].bins)
    assert areas["box"].geometry == "bbox_2d"


BAD_MASKS = [
    {"counts": "abc", "size": [48, 64]},
    {"counts": [1, 2, 3], "size": [48, 64]},
    {"counts": [5, 10**12], "size": [48, 64]},
    {"counts": [0, 48 * 64], "size": [48, 65]},
    {"counts": "~~~", "size": [48, 64]},
    {"counts": None, "size": "large"},
    {"counts": [48 * 64], "size": [48, 64]},
]


@pytest.mark.req("D-1", "Q-13")
@pytest.mark.parametrize("mask", BAD_MASKS, ids=str)
def test_one_bad_mask_refuses_neither_file_nor_object(tmp_path: Path, mask: dict[str, Any]) -> None:
    source = write_coco(tmp_path / "coco", [{}, {"segmentation": mask}])

    summary, (sample,) = imported("coco", source, tmp_path)

    assert [item.bins for item in sample.objects] == [(127, 128, 444, 383)] * 2
    assert summary.changes == {"unreadable mask to its box": 1}


@pytest.mark.req("D-1")
def test_cvat_marks_every_mask_a_crowd_and_means_an_object(tmp_path: Path) -> None:
    mask = packed(bitmap((10, 6, 20, 20)))
    rows = [
        {"segmentation": mask, "iscrowd": 1, "attributes": {"occluded": False}},
        {"segmentation": mask, "iscrowd": 1},
    ]

    summary, (sample,) = imported("coco", write_coco(tmp_path / "coco", rows), tmp_path)

    assert len(sample.objects) == 1
    assert [problem.kind for problem in summary.problems] == ["crowd"]


def test_run_lengths_are_read_as_coco_s_own_tool_packs_them() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.97):
        pixels = (rng.random((48, 64)) < share).astype(np.uint8)
        assert (decode_run_lengths(packed(pixels), SIZE) == pixels.astype(bool)).all()
        assert (decode_run_lengths(counted(pixels), SIZE) == pixels.astype(bool)).all()


def test_outlines_enclose_what_the_bitmap_covers_with_holes_filled() -> None:
    ring = bitmap((10, 10, 30, 30))
    ring[15:25, 15:25] = 0
    ring[20, 20] = 1
    corner = bitmap((0, 0, 4, 4), (4, 4, 8, 8))

    (outer,) = bitmap_parts(ring.astype(bool))

    assert outer.tolist() == [[10, 10], [30, 10], [30, 30], [10, 30]]
    assert [signed_area(part) for part in bitmap_parts(corner.astype(bool))] == [16, 16]
    assert bitmap_parts(np.zeros((3, 3), bool)) == []


def test_random_bitmaps_give_outlines_whose_area_is_that_of_the_filled_parts() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        pixels = rng.random((12, 12)) < 0.6
        parts = bitmap_parts(pixels)
        assert signed_area(join_polygons(parts)) == pytest.approx(sum(signed_area(part) for part in parts))


@pytest.mark.req("D-1", "D-2")
def test_labelme_masks_and_circles_are_read(tmp_path: Path) -> None:
    stream = BytesIO()
    Image.fromarray(np.ones((12, 10), np.uint8) * 255).save(stream, format="PNG")
    mask = {
        "shape_type": "mask",
        "points": [[8, 6], [17, 17]],
        "mask": base64.b64encode(stream.getvalue()).decode(),
    }
    circle = {"shape_type": "circle", "points": [[32, 24], [42, 24]]}
    write_labelme(tmp_path / "src", "a", [mask, circle])

    summary, (sample,) = imported("labelme", tmp_path / "src", tmp_path, simplify_bins=0)

    first, second = sample.objects
    assert first.bins == (127, 128, 285, 128, 285, 383, 127, 383)
    assert area_in_bins(second.bins) == pytest.approx(math.pi * 100 * 999 / 63 * 999 / 47, rel=0.01)
    assert summary.changes == {"mask to outline": 1, "circle to polygon": 1}


@pytest.mark.req("D-1")
def test_an_embedded_image_stands_in_for_a_missing_file(tmp_path: Path) -> None:
    stream = BytesIO()
    Image.new("RGB", SIZE, (9, 8, 7)).save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    file = write_labelme(
        tmp_path / "src", "a", [{"points": [[8, 6], [8, 18], [28, 6]]}], imagePath="gone.jpg", imageData=data
    )
    file.with_suffix(".png").unlink()

    summary, (sample,) = imported("labelme", tmp_path / "src", tmp_path)

    with Image.open(sample.image_files[0]) as stored:
        assert stored.getpixel((3, 3)) == (9, 8, 7)
    assert summary.problems == ()


@pytest.mark.req("D-2")
def test_a_polygon_of_thousands_of_vertices_is_simplified_and_stays_the_shape(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * math.pi, 2022, endpoint=False)
    points = np.stack([32 + 20 * np.cos(angles), 24 + 18 * np.sin(angles)], axis=1)
    source = write_coco(tmp_path / "coco", [{"segmentation": [points.reshape(-1).tolist()]}])

    summary, (sample,) = imported("coco", source, tmp_path)
    _, (whole,) = imported("coco", source, tmp_path, simplify_bins=0)

    bins = sample.objects[0].bins
    assert len(bins) // 2 < 100 < len(whole.objects[0].bins) // 2
    assert area_in_bins(bins) == pytest.approx(area_in_bins(whole.objects[0].bins), rel=0.01)
    assert summary.num_simplified == 1


def test_simplifying_moves_no_vertex_further_than_asked_and_keeps_small_shapes() -> None:
    rng = np.random.default_rng(2)
    angles = np.sort(rng.random(400)) * 2 * math.pi
    ring = 500 + 300 * np.stack([np.cos(angles), np.sin(angles)], axis=1) + rng.normal(0, 1, (400, 2))
    for tolerance in (0.5, 2.0, 10.0):
        kept = simplify_polygon(ring, tolerance)
        ends = np.roll(kept, -1, axis=0)
        for point in ring:
            chord = ends - kept
            along = ((point - kept) * chord).sum(1) / (chord**2).sum(1)
            nearest = kept + np.clip(along, 0, 1)[:, None] * chord
            assert np.linalg.norm(nearest - point, axis=1).min() <= tolerance + 1e-9
    square = np.asarray([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0.5]])
    assert len(simplify_polygon(square, 5.0)) == 5


@pytest.mark.req("D-2")
def test_objects_of_images_that_are_left_out_are_counted(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "coco", [{}, {"image_id": 2}, {"image_id": 2}, {"image_id": 2}])
    file = source / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 2, "file_name": "gone.png", "width": 64, "height": 48})
    file.write_text(json.dumps(content))

    summary, _ = imported("coco", source, tmp_path)

    assert (summary.num_images_left_out, summary.num_objects_left_out) == (1, 3)
    assert "left out: 1 images, 3 objects (3 of them on those images)" in describe_summary(summary)


@pytest.mark.req("D-1", "D-3")
def test_a_sample_that_round_shapes_make_huge_is_named_with_what_makes_it_short(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    ring = np.stack([32 + 20 * np.cos(angles), 24 + 20 * np.sin(angles)], axis=1).ravel().tolist()
    source = write_coco(tmp_path / "coco", [{"segmentation": [ring]}] * 28)

    summary, (sample,) = imported("coco", source, tmp_path, simplify_bins=0)
    num_coordinates = sum(len(item.bins) for item in sample.objects)
    (note,) = [note for note in summary.notes if "coordinates" in note]
    assert num_coordinates > 2000
    assert f"{num_coordinates} for 28 objects" in note
    assert sample.sample_id in note

    short, _ = imported("coco", source, tmp_path, simplify_bins=3)
    assert not [note for note in short.notes if "coordinates" in note]
