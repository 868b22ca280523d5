"""Scenes of handwritten digits: seeded, labelled where the ink is, train and validation apart."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample, read_dataset
from rollstream.datasets.digit_outline import digit_shape, ink_contours, simplify_outline
from rollstream.datasets.scene_drawing import SceneSettings, draw_scene
from rollstream.datasets.scenes import make_scenes, split_shapes
from tests.builders.datasets import tree_bytes
from tests.builders.polygons import is_canonical


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "data", num_train=40, num_val=12, seed=5).folder


def all_samples(folder: Path) -> list[Sample]:
    splits = [read_dataset(folder / f"{split}.jsonl", check_images=True) for split in ("train", "val")]
    return [sample for samples in splits for sample in samples]


def test_the_data_set_reads_back_with_its_images(scenes_folder: Path) -> None:
    samples = all_samples(scenes_folder)

    assert len(samples) == 52
    assert {sample.task for sample in samples} == {"bbox", "poly"}
    assert {len(sample.objects) for sample in samples} == {1, 2, 3}
    assert all((sample.width, sample.height) == (128, 128) for sample in samples)
    assert samples[0].sample_id == "train-00000"
    assert samples[-1].image_paths == ("images/val-00011.png",)


def test_equal_arguments_give_equal_bytes_and_a_larger_set_begins_with_the_smaller(
    scenes_folder: Path, tmp_path: Path
) -> None:
    small, again, other = (
        make_scenes(tmp_path / name, num_train=3, num_val=1, seed=seed).folder
        for name, seed in (("small", 5), ("again", 5), ("other", 6))
    )

    assert tree_bytes(again) == tree_bytes(small)
    for name in ("images/train-00002.png", "images/val-00000.png"):
        assert (small / name).read_bytes() == (scenes_folder / name).read_bytes()
        assert (other / name).read_bytes() != (scenes_folder / name).read_bytes()


def test_ink_lies_inside_the_labels_and_paper_outside(scenes_folder: Path) -> None:
    for sample in all_samples(scenes_folder):
        grey = np.asarray(Image.open(sample.image_files[0]).convert("L"), dtype=float)
        paper = float(np.median(grey))
        inked = np.abs(grey - paper) > 60
        labelled = np.zeros_like(inked)
        for item in sample.objects:
            columns = np.asarray(item.bins[0::2]) / 999 * 127
            rows = np.asarray(item.bins[1::2]) / 999 * 127
            top, bottom = int(rows.min()), int(np.ceil(rows.max()))
            left, right = int(columns.min()), int(np.ceil(columns.max()))
            labelled[max(top - 2, 0) : bottom + 3, max(left - 2, 0) : right + 3] = True
            assert inked[top : bottom + 1, left : right + 1].mean() > 0.1
        assert (paper < 110) == (sample.task == "poly")
        assert not (inked & ~labelled).any()


def test_polygons_are_canonical_and_short_and_boxes_use_bins_between_pixels(scenes_folder: Path) -> None:
    objects = [item for sample in all_samples(scenes_folder) for item in sample.objects]
    polygons = [item.bins for item in objects if item.geometry == "poly"]
    boxes = [item.bins for item in objects if item.geometry == "bbox_2d"]

    assert all(is_canonical(bins) and 6 <= len(bins) <= 16 for bins in polygons)
    off_pixel = [abs(value / 999 * 127 - round(value / 999 * 127)) for bins in boxes for value in bins]
    assert max(off_pixel) > 0.45


def test_train_and_validation_show_different_scans() -> None:
    train, validation = split_shapes(0)

    inks = [{shape.ink.tobytes() for shape in shapes} for shapes in (train, validation)]

    assert len(train) + len(validation) == 1797
    assert 300 < len(validation) < 400
    assert not inks[0] & inks[1]
    assert {shape.digit for shape in validation} == set(range(10))


@pytest.mark.parametrize("polygon_share, expected", [(0.0, "bbox_2d"), (1.0, "poly")])
def test_the_polygon_share_decides_the_geometry(polygon_share: float, expected: str) -> None:
    shapes = split_shapes(0)[1][:40]
    settings = SceneSettings(polygon_share=polygon_share)

    drawn = [draw_scene(shapes, settings, np.random.default_rng(seed)).objects for seed in range(8)]

    assert {item.geometry for objects in drawn for item in objects} == {expected}


def test_a_square_of_ink_has_a_square_outline_and_box() -> None:
    scan = np.zeros((8, 8))
    scan[2:6, 2:6] = 16

    shape = digit_shape(scan, 0)

    # half the ink level lies near the edge of the enlarged square, 16..48 of 64
    assert np.abs(shape.box_xyxy - np.array([15.5, 15.5, 47.5, 47.5])).max() < 1.5
    assert 4 <= len(shape.outline) <= 8
    assert shape.is_whole


def test_ink_in_two_parts_is_boxed_whole_and_not_outlined_as_one() -> None:
    scan = np.zeros((8, 8))
    scan[0:3, 0:3] = 16
    scan[5:8, 5:8] = 16

    shape = digit_shape(scan, 0)

    assert shape.box_xyxy[0] < 1
    assert shape.box_xyxy[2] > 62
    assert not shape.is_whole
    assert ink_contours(np.zeros((8, 8))) == []
    with pytest.raises(ValueError, match="expected some ink"):
        digit_shape(np.zeros((8, 8)), 3)


def test_simplifying_keeps_the_corners_of_a_star() -> None:
    corners = np.array([[0, -9], [3, -3], [9, 0], [3, 3], [0, 9], [-3, 3], [-9, 0], [-3, -3]], dtype=float)
    dense = np.concatenate(
        [
            np.linspace(start, end, 20, endpoint=False)
            for start, end in zip(corners, np.roll(corners, -1, 0), strict=True)
        ]
    )

    simplified = simplify_outline(dense, 8)

    assert {tuple(vertex) for vertex in simplified} == {tuple(vertex) for vertex in corners}
    assert len(simplify_outline(dense, 3)) == 3
    with pytest.raises(ValueError, match="expected at least 3"):
        simplify_outline(dense, 2)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"num_train": 0}, "scenes num_train: got 0"),
        ({"num_val": 0}, "scenes num_val: got 0"),
        ({"image_size": 10}, "scenes image_size: got 10, expected 64 to 2048"),
        ({"polygon_share": 1.5}, "scenes polygon_share: got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, int], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        make_scenes(tmp_path / "data", **arguments)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_progress_counts_every_scene_and_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt_at_three(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "data", num_train=4, num_val=1, progress=interrupt_at_three)

    assert seen == [(1, 5), (2, 5), (3, 5)]
    assert os.listdir(tmp_path) == []
