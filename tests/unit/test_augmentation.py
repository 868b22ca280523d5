"""Jitter, crop, scale and flip: objects stay whole, keep their place in the picture, and use every bin."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from broker_schemas.method.coordinates import bin_from_pixels, pixels_from_bin
from broker_schemas.records.records import GroundTruthObject
from learner.augmentation import AugmentationSettings, PixelTransform, draw_transform, move_object
from tests.builders.polygons import is_canonical

WIDTH, HEIGHT = 96, 64
EVERYTHING = AugmentationSettings(
    jitter_pixels=0.0, crop_probability=1.0, shrink_probability=1.0, flip_probability=0.5
)


def box_of_pixels(x1: int, y1: int, x2: int, y2: int) -> GroundTruthObject:
    x = [bin_from_pixels(value, WIDTH) for value in (x1, x2)]
    y = [bin_from_pixels(value, HEIGHT) for value in (y1, y2)]
    return GroundTruthObject(desc="cell", geometry="bbox_2d", bins=(x[0], y[0], x[1], y[1]))


def identity() -> PixelTransform:
    return PixelTransform(
        width=WIDTH,
        height=HEIGHT,
        crop_xyxy=(0, 0, WIDTH, HEIGHT),
        target_xyxy=(0, 0, WIDTH, HEIGHT),
        flipped=False,
    )


def test_without_augmentation_nothing_changes() -> None:
    item, image = box_of_pixels(10, 20, 50, 40), Image.new("RGB", (WIDTH, HEIGHT))
    rng = np.random.default_rng(0)
    transform = draw_transform(WIDTH, HEIGHT, [item], AugmentationSettings(), rng)
    assert transform.is_identity
    assert transform.move_image(image) is image
    assert move_object(item, transform, 0.0, rng) == item


def test_jitter_reaches_bins_between_pixels_and_stays_within_half_a_pixel() -> None:
    """On 64 pixels one pixel is 15.9 bins wide: without jitter only every sixteenth bin would occur."""
    rng = np.random.default_rng(3)
    item = box_of_pixels(10, 30, 50, 40)
    tops = {move_object(item, identity(), 0.5, rng).bins[1] for _ in range(400)}
    assert len(tops) >= 15
    assert all(abs(pixels_from_bin(top, HEIGHT) - 30) <= 0.5 + 0.04 for top in tops)


@pytest.mark.parametrize("seed", range(40))
def test_a_labelled_rectangle_still_fits_the_picture_after_any_transform(seed: int) -> None:
    """Given a white rectangle on black: its moved box is where the white pixels went."""
    rng = np.random.default_rng(seed)
    x1, y1 = int(rng.integers(5, 40)), int(rng.integers(5, 25))
    x2, y2 = x1 + int(rng.integers(15, 40)), y1 + int(rng.integers(12, 30))
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y1 : y2 + 1, x1 : x2 + 1] = 255
    item = box_of_pixels(x1, y1, x2, y2)
    transform = draw_transform(WIDTH, HEIGHT, [item], EVERYTHING, rng)
    moved_image = np.asarray(transform.move_image(Image.fromarray(pixels)))[:, :, 0]
    rows, columns = np.nonzero(moved_image > 200)
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    bins = move_object(item, transform, 0.0, rng).bins
    extents = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    expected = [pixels_from_bin(value, extent) for value, extent in zip(bins, extents, strict=True)]
    assert np.abs(np.subtract(found, expected)).max() <= 1.5


def test_the_transforms_of_the_test_above_are_not_all_trivial() -> None:
    box = box_of_pixels(30, 20, 60, 40)
    drawn = [
        draw_transform(WIDTH, HEIGHT, [box], EVERYTHING, np.random.default_rng(seed)) for seed in range(40)
    ]
    assert len({(t.crop_xyxy, t.target_xyxy) for t in drawn}) == 40
    assert {t.flipped for t in drawn} == {True, False}


def test_a_crop_never_cuts_an_object() -> None:
    settings = AugmentationSettings(crop_probability=1.0, crop_fraction=1.0)
    objects = [box_of_pixels(8, 6, 20, 20), box_of_pixels(60, 30, 90, 60)]
    for seed in range(50):
        crop = draw_transform(WIDTH, HEIGHT, objects, settings, np.random.default_rng(seed)).crop_xyxy
        assert crop[0] <= 8
        assert crop[1] <= 6
        assert crop[2] >= 91
        assert crop[3] >= 61


def test_a_flipped_polygon_is_canonical_again() -> None:
    item = GroundTruthObject(desc="leaf", geometry="poly", bins=(100, 100, 500, 200, 300, 600))
    flipped = PixelTransform(**{**vars(identity()), "flipped": True})
    moved = move_object(item, flipped, 0.0, np.random.default_rng(0))
    assert is_canonical(moved.bins)
    assert sorted(zip(moved.bins[0::2], moved.bins[1::2], strict=True)) == [
        (499, 200),
        (699, 600),
        (899, 100),
    ]


def test_a_box_keeps_a_bin_of_width_at_the_border() -> None:
    item = GroundTruthObject(desc="dot", geometry="bbox_2d", bins=(999, 0, 999, 1))
    moved = move_object(item, identity(), 0.5, np.random.default_rng(1))
    assert moved.bins[2] > moved.bins[0]
    assert moved.bins[3] > moved.bins[1]


def test_the_same_seed_draws_the_same() -> None:
    box = box_of_pixels(30, 20, 60, 40)
    first, second = (
        draw_transform(WIDTH, HEIGHT, [box], EVERYTHING, np.random.default_rng(9)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", ["crop_probability", "flip_probability", "crop_fraction"])
def test_probabilities_outside_0_to_1_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AugmentationSettings(**{name: 1.5})
