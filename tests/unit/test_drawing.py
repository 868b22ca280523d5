"""Shapes drawn on images: pixel positions by the formula, two colours, nothing that crashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollstream.show.drawing import (
    GROUND_TRUTH_COLOUR,
    PREDICTION_COLOUR,
    Colour,
    Shape,
    draw_shapes,
    scale_for,
    to_canvas,
)


def make_box(*bins: int, label: str = "") -> Shape:
    return Shape(label=label, geometry="bbox_2d", bins=bins or (200, 300, 600, 700))


def pixels_of(image: Image.Image, colour: Colour) -> Any:
    """Return (y, x) of pixels close to a colour."""
    distance = np.abs(np.asarray(image, dtype=int) - np.asarray(colour)).sum(axis=2)
    return np.argwhere(distance < 40)


def test_a_box_is_drawn_where_the_formula_puts_its_bins() -> None:
    image = Image.new("RGB", (400, 200))

    drawn = draw_shapes(image, ground_truth=[make_box(250, 100, 750, 900)])

    found = pixels_of(drawn, GROUND_TRUTH_COLOUR)
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    expected = [250 / 999 * 399, 100 / 999 * 199, 750 / 999 * 399, 900 / 999 * 199]
    assert np.allclose([left, top, right, bottom], expected, atol=2.5)
    inside = found[(found[:, 1] > left + 6) & (found[:, 1] < right - 6)]
    assert not ((inside[:, 0] > top + 6) & (inside[:, 0] < bottom - 6)).any()


def test_a_triangle_has_its_three_corners_and_not_the_fourth_of_its_box() -> None:
    image = Image.new("RGB", (500, 500))
    triangle = Shape(label="", geometry="poly", bins=(100, 100, 900, 100, 100, 900))

    found = pixels_of(draw_shapes(image, predictions=[triangle]), PREDICTION_COLOUR)

    for corner in ((50, 50), (50, 450), (450, 50)):
        assert np.abs(found - corner).sum(axis=1).min() <= 6
    assert np.abs(found - (450, 450)).sum(axis=1).min() > 300


@pytest.mark.parametrize(
    "size,expected",
    [
        ((128, 128), (384, 384)),
        ((100, 60), (400, 240)),
        ((640, 480), (640, 480)),
        ((4096, 1024), (1024, 256)),
    ],
)
def test_small_images_grow_by_a_whole_factor_and_large_ones_shrink(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert draw_shapes(Image.new("L", size), ground_truth=[make_box()]).size == expected


def test_a_scaled_point_lies_in_the_middle_of_its_enlarged_pixel() -> None:
    assert to_canvas((0, 0), (128, 128), 3.0) == (1.0, 1.0)
    assert to_canvas((999, 999), (128, 128), 3.0) == (382.0, 382.0)
    assert scale_for((128, 128), smallest_side_px=384, largest_side_px=1024) == 3.0


def test_ground_truth_and_predictions_show_in_their_own_colours_even_when_they_coincide() -> None:
    image = Image.new("RGB", (128, 128), (90, 90, 90))

    drawn = draw_shapes(image, ground_truth=[make_box()], predictions=[make_box()])

    assert len(pixels_of(drawn, GROUND_TRUTH_COLOUR)) > 100
    assert len(pixels_of(drawn, PREDICTION_COLOUR)) > 100


def test_the_given_image_stays_as_it_is_and_nothing_to_draw_gives_it_scaled() -> None:
    image = Image.new("RGB", (384, 384), (7, 8, 9))
    before = image.tobytes()

    drawn = draw_shapes(image, ground_truth=[make_box(label="cell")])
    plain = draw_shapes(image)

    assert image.tobytes() == before
    assert drawn.tobytes() != before
    assert plain.tobytes() == before


def test_a_label_is_written_outside_its_box_and_left_out_in_a_crowd() -> None:
    image = Image.new("RGB", (600, 600))

    labelled = draw_shapes(image, ground_truth=[make_box(300, 300, 700, 700, label="platelet")])
    bare = draw_shapes(image, ground_truth=[make_box(300, 300, 700, 700)])
    crowd = [make_box(40 * n, 40 * n, 40 * n + 30, 40 * n + 30, label="platelet") for n in range(20)]
    nameless = [make_box(*(int(v) for v in shape.bins)) for shape in crowd]

    changed = np.argwhere((np.asarray(labelled) != np.asarray(bare)).any(axis=2))
    assert len(changed) > 200
    assert changed[:, 0].max() < 300 / 999 * 599
    assert (
        draw_shapes(image, ground_truth=crowd).tobytes()
        == draw_shapes(image, ground_truth=nameless).tobytes()
    )


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"desc": "a"},
        {"bbox_2d": [1, 2, 3]},
        {"bbox_2d": "1234"},
        {"bbox_2d": [1, 2, 3, float("nan")]},
        {"bbox_2d": [1, 2, 3, None]},
        {"bbox_2d": [1, 2, 3, 10**400]},
        {"poly": [1, 2, 3, 4]},
        {"poly": [[1, 2], [3, 4], [5]]},
    ],
)
def test_what_a_model_wrote_wrongly_is_no_shape(item: dict[str, Any]) -> None:
    assert Shape.from_map(item) is None


def test_polygons_are_read_flat_and_as_pairs() -> None:
    flat = Shape.from_map({"desc": "leaf", "poly": [1, 2, 3, 4, 5, 6]})
    pairs = Shape.from_map({"desc": "leaf", "poly": [[1, 2], [3, 4], [5, 6]]})

    assert flat == pairs
    assert flat is not None
    assert flat.corner_points() == ((1, 2), (3, 4), (5, 6))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bins=st.lists(st.integers(-2000, 3000), min_size=3, max_size=6),
    label=st.text(max_size=40),
)
def test_any_shape_and_any_label_can_be_drawn_on_any_image(
    size: tuple[int, int], bins: list[int], label: str
) -> None:
    item = {"desc": label, "poly": [*bins, *bins]}
    shape = Shape.from_map(item)
    assert shape is not None

    drawn = draw_shapes(Image.new("L", size), predictions=[shape], smallest_side_px=64, largest_side_px=80)

    assert 64 <= max(drawn.size) <= 110
