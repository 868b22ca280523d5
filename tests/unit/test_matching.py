"""Matching: numbers worked by hand, the gate, candidates, and least cost against trying every assignment."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from broker_schemas.records.records import GroundTruthObject
from consumers.matching import MatchSettings, candidate_ious, match_objects
from consumers.shapes import is_degenerate
from tests.builders.settings import match_settings
from tests.builders.tokenizers import make_box, make_polygon

DEFAULTS = match_settings()


def box(*bins: int) -> GroundTruthObject:
    return make_box(bins=bins)


def polygon(*bins: int) -> GroundTruthObject:
    return make_polygon(bins=bins)


def random_shapes(rng: random.Random, count: int, polygon_share: float) -> list[GroundTruthObject]:
    """Small shapes close together, so that overlaps, ties and gated pairs all occur."""
    shapes = []
    for _ in range(count):
        x, y = rng.randrange(0, 30, 5), rng.randrange(0, 30, 5)
        width, height = rng.randrange(0, 30, 5), rng.randrange(5, 30, 5)
        if rng.random() < polygon_share:
            shapes.append(
                polygon(x, y, x + width, y, x + width, y + height, x + rng.randrange(30), y + height)
            )
        else:
            shapes.append(box(x, y, x + width, y + height))
    return shapes


def least_cost(overlap: Any, settings: MatchSettings) -> float:
    """Try every one-to-one assignment of feasible pairs."""
    num_predictions, num_truth = overlap.shape
    best = math.inf
    choices = [
        [None, *(c for c in range(num_truth) if overlap[r, c] >= settings.maskiou_gate)]
        for r in range(num_predictions)
    ]
    for chosen in itertools.product(*choices):
        taken = [column for column in chosen if column is not None]
        if len(set(taken)) == len(taken):
            cost = sum(1 - overlap[r, c] for r, c in enumerate(chosen) if c is not None)
            cost += settings.fp_cost * (num_predictions - len(taken)) + settings.fn_cost * (
                num_truth - len(taken)
            )
            best = min(best, cost)
    return best


@pytest.mark.req("M-5")
@pytest.mark.parametrize("polygon_share, cases", [(0.0, 1500), (0.5, 700)])
def test_the_assignment_costs_as_little_as_the_best_of_all(polygon_share: float, cases: int) -> None:
    rng = random.Random(int(polygon_share * 10))
    for _ in range(cases):
        predictions = random_shapes(rng, rng.randint(1, 4), polygon_share)
        truth = random_shapes(rng, rng.randint(1, 4), polygon_share)
        settings = match_settings(
            candidate_top_k=rng.randint(1, 4),
            maskiou_gate=rng.choice([0.0, 0.1, 0.3]),
            fp_cost=rng.choice([0.1, 0.5, 1.0]),
            fn_cost=rng.choice([0.1, 0.4, 1.0]),
            maskiou_resolution=64,
        )
        overlap = candidate_ious(predictions, truth, settings)
        result = match_objects(predictions, truth, settings)
        cost = sum(1 - overlap[pair] for pair in result.pairs)
        cost += settings.fp_cost * len(result.unmatched_predictions)
        cost += settings.fn_cost * len(result.unmatched_ground_truth)
        assert cost == pytest.approx(least_cost(overlap, settings), abs=1e-9)
        assert sorted([p for p, _ in result.pairs] + [*result.unmatched_predictions]) == list(
            range(len(predictions))
        )
        assert sorted([g for _, g in result.pairs] + [*result.unmatched_ground_truth]) == list(
            range(len(truth))
        )
        assert result.gating_rejections == int(np.sum(overlap < settings.maskiou_gate))


@pytest.mark.req("M-5")
def test_box_overlap_is_exact_in_bins() -> None:
    overlap = candidate_ious([box(0, 0, 10, 10)], [box(5, 0, 15, 10), box(10, 0, 20, 10)], DEFAULTS)
    assert overlap.tolist() == [[50 / 150, 0.0]]


@pytest.mark.req("M-5")
def test_a_pair_at_the_gate_passes_and_one_just_below_is_counted_as_rejected() -> None:
    # 3 of 10 columns are shared: IoU is 30 / 100.
    predictions, truth = [box(0, 0, 10, 10)], [box(0, 0, 3, 10)]
    at_gate = match_objects(predictions, truth, DEFAULTS)
    assert (at_gate.pairs, at_gate.gating_rejections) == (((0, 0),), 0)
    below = match_objects(predictions, truth, match_settings(maskiou_gate=math.nextafter(0.3, 1.0)))
    assert (below.pairs, below.gating_rejections) == ((), 1)
    assert (below.unmatched_predictions, below.unmatched_ground_truth) == ((0,), (0,))


@pytest.mark.req("M-5")
def test_the_best_total_beats_the_best_single_pair() -> None:
    # Taking (0, 0) at IoU 0.9 first would leave prediction 1 with nothing.
    predictions = [box(0, 0, 100, 90), box(0, 0, 100, 100)]
    truth = [box(0, 0, 100, 100), box(0, 0, 60, 90)]
    assert match_objects(predictions, truth, match_settings(maskiou_gate=0.6)).pairs == ((0, 1), (1, 0))


@pytest.mark.req("M-5")
def test_candidates_are_the_largest_overlaps_and_equal_ones_go_by_index() -> None:
    truth = [box(0, 0, 10, 5), box(0, 0, 10, 10), box(0, 5, 10, 10), box(0, 0, 10, 5)]
    overlap = candidate_ious([box(0, 0, 10, 10)], truth, match_settings(candidate_top_k=2))
    assert np.isfinite(overlap).tolist() == [[True, True, False, False]]


@pytest.mark.req("M-5")
def test_many_equal_candidates_are_taken_in_the_order_of_the_ground_truth() -> None:
    rng = random.Random(0)
    sides = [rng.choice([10, 20]) for _ in range(200)]
    truth = [box(0, 0, side, 20) for side in sides]
    overlap = candidate_ious([box(0, 0, 20, 20)], truth, match_settings(candidate_top_k=30))
    assert (
        np.flatnonzero(np.isfinite(overlap[0])).tolist()
        == [i for i, side in enumerate(sides) if side == 20][:30]
    )


@pytest.mark.req("M-5")
def test_without_any_overlap_candidates_are_the_nearest_centres_and_equal_ones_go_by_index() -> None:
    truth = [box(500, 0, 510, 10), box(30, 0, 40, 10), box(0, 30, 10, 40), box(20, 0, 30, 10)]
    overlap = candidate_ious([box(0, 0, 10, 10)], truth, match_settings(candidate_top_k=2))
    assert np.isfinite(overlap).tolist() == [[False, True, False, True]]


@pytest.mark.req("M-5")
def test_a_polygon_is_compared_by_mask_and_not_by_its_extent() -> None:
    triangle, square = polygon(0, 0, 400, 0, 0, 400), box(0, 0, 400, 400)
    opposite = polygon(400, 0, 400, 400, 0, 400)
    overlap = candidate_ious([square, triangle], [triangle, opposite], DEFAULTS)
    assert overlap[0] == pytest.approx([0.5, 0.5], abs=0.02)
    assert overlap[1] == pytest.approx([1.0, 0.0], abs=0.02)


@pytest.mark.req("M-5")
def test_the_largest_bin_lies_on_the_last_pixel_but_one_step_of_the_canvas() -> None:
    # On 11 pixels a bin v lies at 10 v / 999: the whole is 10 x 10 pixels and a quarter of it 5 x 5.
    whole, quarter = polygon(0, 0, 999, 0, 999, 999, 0, 999), box(0, 0, 500, 500)
    overlap = candidate_ious([whole], [quarter], match_settings(maskiou_resolution=11, maskiou_gate=0.0))
    assert overlap.tolist() == [[0.25]]


@pytest.mark.req("M-5")
@pytest.mark.parametrize(
    "bins",
    [
        (500, 100, 503, 100, 503, 600, 500, 600),
        (500, 100, 501, 100, 501, 600, 500, 600),
        (0, 0, 999, 998, 999, 999),
        (0, 0, 1, 0, 0, 1),
        (10, 10, 12, 900, 11, 900),
    ],
)
def test_identical_shapes_match_however_thin(bins: tuple[int, ...]) -> None:
    shape, turned = polygon(*bins), polygon(*bins[2:], *bins[:2])
    overlap = candidate_ious([shape, turned], [shape, turned], DEFAULTS)
    assert overlap.ravel() == pytest.approx([1.0] * 4)
    assert len(match_objects([shape], [turned], DEFAULTS).pairs) == 1


@pytest.mark.req("M-5")
def test_thin_and_small_shapes_have_the_overlap_of_their_areas() -> None:
    bar, beside = polygon(500, 100, 504, 100, 504, 600, 500, 600), box(502, 100, 506, 600)
    small, half = polygon(40, 40, 48, 40, 48, 48, 40, 48), polygon(40, 40, 48, 40, 40, 48)
    overlap = candidate_ious([bar, small], [beside, half], match_settings(maskiou_gate=0.0))
    assert overlap.diagonal() == pytest.approx([1 / 3, 0.5], abs=0.01)


@pytest.mark.req("M-5")
def test_a_pair_that_is_not_rasterised_could_not_have_passed_the_gate() -> None:
    rng = random.Random(8)
    for _ in range(5):
        shapes = [polygon(*(rng.randint(0, 300) for _ in range(2 * rng.randint(3, 9)))) for _ in range(8)]
        stars = [star(rng, rng.randint(3, 12)) for _ in range(8)]
        exact = candidate_ious(
            [*shapes, *stars], [*stars, *shapes], match_settings(maskiou_gate=0.0, candidate_top_k=99)
        )
        gated = candidate_ious([*shapes, *stars], [*stars, *shapes], match_settings(candidate_top_k=99))
        assert ((exact >= 0.3) == (gated >= 0.3)).all()
        assert (gated >= exact - 0.02).all()


def star(rng: random.Random, num_vertices: int) -> GroundTruthObject:
    x, y, radius = rng.randint(100, 300), rng.randint(100, 300), rng.randint(10, 90)
    bins = []
    for k in range(num_vertices):
        angle, reach = 2 * math.pi * k / num_vertices, radius * rng.uniform(0.4, 1.0)
        bins += [round(x + reach * math.cos(angle)), round(y + reach * math.sin(angle))]
    return polygon(*bins)


@pytest.mark.req("M-5")
@pytest.mark.parametrize(
    "shape, expected",
    [
        (box(5, 5, 5, 50), True),
        (box(9, 5, 5, 50), True),
        (polygon(0, 0, 50, 50, 100, 100), True),
        (polygon(7, 7, 7, 7, 7, 7), True),
        (polygon(0, 0, 0, 0, 50, 20), True),
        (polygon(0, 0, 50, 50, 100, 101), False),
        (polygon(0, 0, 50, 50, 50, 0, 0, 50), False),
    ],
)
def test_a_degenerate_shape_overlaps_nothing(shape: GroundTruthObject, expected: bool) -> None:
    assert is_degenerate(shape) is expected
    if expected:
        others = [shape, box(0, 0, 100, 100), polygon(0, 0, 100, 0, 100, 100)]
        assert candidate_ious([shape], others, DEFAULTS).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.req("M-5")
@pytest.mark.parametrize("num_predictions, num_truth", [(0, 0), (0, 3), (2, 0)])
def test_with_nothing_on_one_side_all_of_the_other_is_unmatched(num_predictions: int, num_truth: int) -> None:
    result = match_objects([make_box()] * num_predictions, [make_polygon()] * num_truth, DEFAULTS)
    assert result.pairs == ()
    assert result.unmatched_predictions == tuple(range(num_predictions))
    assert result.unmatched_ground_truth == tuple(range(num_truth))
    assert result.gating_rejections == 0


@pytest.mark.req("M-5")
def test_descriptions_play_no_part() -> None:
    result = match_objects([make_box("cat")], [make_box("dog")], DEFAULTS)
    assert result.pairs == ((0, 0),)


@pytest.mark.req("M-5")
@pytest.mark.parametrize(
    "field, value",
    [
        ("candidate_top_k", 0),
        ("candidate_top_k", True),
        ("candidate_top_k", 2.0),
        ("maskiou_gate", -0.1),
        ("maskiou_gate", 1.1),
        ("maskiou_gate", math.nan),
        ("maskiou_resolution", 1),
        ("fp_cost", -1.0),
        ("fp_cost", math.inf),
        ("fn_cost", "1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        match_settings(**{field: value})
