"""Transport targets: the bounds of section 6, and the iteration against a plain log-domain one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from broker_schemas.records.records import GroundTruthObject
from consumers.boundaries import Boundary, boundaries_of
from consumers.sinkhorn import barycentric_images
from consumers.transport_targets import (
    TargetNotBuilt,
    TransportSettings,
    barycentric_targets,
    targets_of_pairs,
)
from tests.builders.settings import transport_settings
from tests.builders.tokenizers import make_box, make_polygon, random_objects

DEFAULTS = transport_settings()
PLAIN_COSTS = [
    transport_settings(ot_cost="l2", ot_epsilon=2.0),
    transport_settings(ot_cost="l1", ot_epsilon=2.0),
]


def boundary_of(shape: Any, num_points: int, clearance_bins: float = 0.0) -> Boundary:
    return boundaries_of([shape], num_points, clearance_bins)[0]


def regular_polygon(
    num_vertices: int, radius: float, centre: int = 500, turn: float = 0.0
) -> GroundTruthObject:
    angles = [2 * math.pi * k / num_vertices + turn for k in range(num_vertices)]
    return make_polygon(
        bins=tuple(round(centre + radius * f(a)) for a in angles for f in (math.cos, math.sin))
    )


def star_polygon(rng: random.Random, num_vertices: int, radius: float) -> GroundTruthObject:
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(num_vertices))
    radii = [radius * rng.uniform(0.4, 1.0) for _ in angles]
    bins = [round(500 + r * f(a)) for r, a in zip(radii, angles, strict=True) for f in (math.cos, math.sin)]
    return make_polygon(bins=tuple(bins))


def rotate(shape: GroundTruthObject, vertices: int) -> GroundTruthObject:
    return make_polygon(bins=shape.bins[2 * vertices :] + shape.bins[: 2 * vertices])


def plain_log_sinkhorn(
    cost: Any, a: Any, b: Any, points: Any, epsilon: float, iterations: int
) -> NDArray[Any]:
    """The iteration as it is written down: one pair, two log-sum-exps, nothing absorbed."""
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(iterations):
        f = np.log(a) - np.logaddexp.reduce(g[None, :] + np.log(b)[None, :] - cost / epsilon, axis=1)
        f = f - np.log(a)
        g = -np.logaddexp.reduce(f[:, None] + np.log(a)[:, None] - cost / epsilon, axis=0)
    logits = g[None, :] + np.log(b)[None, :] - cost / epsilon
    plan = np.exp(logits - logits.max(axis=1, keepdims=True))
    images: NDArray[Any] = plan @ points / plan.sum(axis=1, keepdims=True)
    return images


def largest_shift(shape: GroundTruthObject, target: list[int]) -> int:
    return max(abs(got - own) for got, own in zip(target, shape.bins, strict=True))


@pytest.mark.req("M-9")
def test_a_box_on_a_box_takes_the_bins_of_the_ground_truth() -> None:
    truth = make_box(bins=(1, 2, 900, 999))
    assert barycentric_targets(make_box(bins=(5, 5, 40, 50)), truth, DEFAULTS) == [1, 2, 900, 999]


@pytest.mark.req("M-9")
def test_identical_shapes_of_20_bins_or_more_map_to_within_a_bin() -> None:
    rng = random.Random(0)
    shapes = [regular_polygon(n, r) for n in (3, 4, 5, 6, 8, 12, 16, 24) for r in (12, 20, 50, 150, 450)]
    while len(shapes) < 250:
        shape = star_polygon(rng, rng.randint(3, 12), rng.choice([20, 30, 60, 200, 450]))
        if min(np.ptp(shape.bins[0::2]), np.ptp(shape.bins[1::2])) >= 20:
            shapes.append(shape)
    # Jagged ones, also with as many vertices as a boundary has points, and one that the method names.
    shapes += [star_polygon(rng, 64, radius) for radius in (20, 40, 100, 450) for _ in range(10)]
    jagged = (597, 505, 617, 488, 603, 508, 615, 507, 617, 491, 610, 510, 610, 509, 611, 501)
    shapes.append(make_polygon(bins=jagged))
    for shape, target in zip(shapes, targets_of_pairs([(s, s) for s in shapes], DEFAULTS), strict=True):
        assert target is not None
        assert largest_shift(shape, target) <= 1, shape.bins


@pytest.mark.req("M-9")
@pytest.mark.parametrize("bins", [(10, 10, 30, 30), (0, 0, 999, 999), (100, 200, 120, 900), (5, 5, 300, 40)])
def test_a_box_and_the_polygon_of_its_corners_map_to_within_a_bin(bins: tuple[int, int, int, int]) -> None:
    x1, y1, x2, y2 = bins
    corners = make_polygon(bins=(x1, y1, x2, y1, x2, y2, x1, y2))
    box = make_box(bins=bins)
    assert largest_shift(box, barycentric_targets(box, corners, DEFAULTS)) <= 1
    assert largest_shift(corners, barycentric_targets(corners, box, DEFAULTS)) <= 1


@pytest.mark.req("M-9")
@pytest.mark.parametrize("turn", [0.0, math.pi / 16])
def test_a_box_on_a_round_polygon_of_the_same_size_keeps_its_extent(turn: float) -> None:
    box = make_box(bins=(300, 300, 700, 700))
    target = barycentric_targets(box, regular_polygon(16, 200, turn=turn), DEFAULTS)
    # Half a bin of slack for a polygon whose vertices do not lie on the axes: its own extent is then 392.
    reach = 200 if turn == 0.0 else 196
    assert largest_shift(make_box(bins=(500 - reach, 500 - reach, 500 + reach, 500 + reach)), target) <= 2


def moved_by(shape: GroundTruthObject, x: int, y: int) -> GroundTruthObject:
    shift = (x, y) * (len(shape.bins) // 2)
    return make_polygon(bins=tuple(value + by for value, by in zip(shape.bins, shift, strict=True)))


@pytest.mark.req("M-9")
def test_a_shape_moved_by_any_shift_maps_to_within_a_bin_of_where_it_went() -> None:
    rng = random.Random(2)
    for _ in range(60):
        shape = star_polygon(rng, rng.choice([3, 6, 12, 40]), rng.choice([30, 100, 200]))
        truth = moved_by(shape, rng.randint(-290, 290), rng.randint(-290, 290))
        assert largest_shift(truth, barycentric_targets(shape, truth, DEFAULTS)) <= 1, shape.bins
    for shift in (20, 40, 80):
        hexagon = regular_polygon(6, 200)
        truth = moved_by(hexagon, shift, 0)
        assert barycentric_targets(hexagon, truth, DEFAULTS) == list(truth.bins)


@pytest.mark.req("M-9")
def test_a_box_anywhere_inside_a_polygon_takes_its_extent() -> None:
    rng = random.Random(3)
    pairs, wanted = [], []
    for num_vertices in range(3, 17):
        for _ in range(12):
            truth = regular_polygon(num_vertices, 200, turn=rng.uniform(0, 2 * math.pi))
            x, y = rng.randint(350, 650), rng.randint(350, 650)
            width, height = rng.randint(40, 250), rng.randint(40, 250)
            pairs.append((make_box(bins=(x - width, y - height, x + width, y + height)), truth))
            xs, ys = truth.bins[0::2], truth.bins[1::2]
            wanted.append(make_box(bins=(min(xs), min(ys), max(xs), max(ys))))
    triangle = make_polygon(bins=(500, 300, 700, 700, 300, 700))
    pairs.append((make_box(bins=(250, 260, 660, 640)), triangle))
    wanted.append(make_box(bins=(300, 300, 700, 700)))
    errors = [
        largest_shift(extent, target)
        for extent, target in zip(wanted, targets_of_pairs(pairs, DEFAULTS), strict=True)
        if target is not None
    ]
    assert len(errors) == len(pairs)
    # The method asks for 2 on average and 6 at most.
    assert max(errors) <= 1


def mask_iou(left: Sequence[int], right: Sequence[int]) -> float:
    masks = [coco_mask.frPyObjects([[float(v) for v in bins]], 1000, 1000)[0] for bins in (left, right)]
    return float(coco_mask.iou(masks[:1], masks[1:], [0])[0][0])


@pytest.mark.req("M-9")
def test_targets_of_jittered_polygons_lie_nearer_to_the_truth_than_the_predictions() -> None:
    rng = random.Random(4)
    overlaps = []
    for _ in range(60):
        truth = star_polygon(rng, rng.randint(6, 16), rng.choice([60, 120, 200]))
        said = make_polygon(bins=tuple(value + rng.randint(-12, 12) for value in truth.bins))
        target = barycentric_targets(said, truth, DEFAULTS)
        overlaps.append((mask_iou(target, truth.bins), mask_iou(said.bins, truth.bins)))
    of_targets, of_predictions = np.array(overlaps).T
    assert of_targets.mean() > of_predictions.mean() + 0.05
    assert of_targets.mean() > 0.87


@pytest.mark.req("M-9")
@pytest.mark.parametrize("settings", PLAIN_COSTS)
def test_the_plain_distances_are_kept_as_they_were(settings: TransportSettings) -> None:
    # Where shapes overlap a plain distance leaves the mass where it is: that is why it is not the default.
    hexagon = regular_polygon(6, 200)
    truth = moved_by(hexagon, 40, 0)
    assert largest_shift(truth, barycentric_targets(hexagon, truth, settings)) > 10
    assert largest_shift(hexagon, barycentric_targets(hexagon, hexagon, settings)) <= 1


@pytest.mark.req("M-9")
def test_what_float32_cannot_hold_is_transported_in_the_log_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(points: Any, *_: Any) -> Any:
        return np.full_like(points, np.nan)

    rng = random.Random(7)
    truths = [star_polygon(rng, num_vertices, 200) for num_vertices in (5, 9, 14)]
    shapes = [
        (make_polygon(bins=tuple(value + rng.randint(-15, 15) for value in truth.bins)), truth)
        for truth in truths
    ]
    expected = targets_of_pairs(shapes, DEFAULTS)
    monkeypatch.setattr("consumers.transport_targets.annealed_images", lost)
    for got, want in zip(targets_of_pairs(shapes, DEFAULTS), expected, strict=True):
        assert got is not None
        assert want is not None
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 2


@pytest.mark.req("M-9")
@pytest.mark.parametrize("epsilon", [0.001, 1.0, 1e6])
def test_every_blur_gives_targets(epsilon: float) -> None:
    settings = transport_settings(ot_epsilon=epsilon)
    rng = random.Random(6)
    for iterations in (1, 5, 400):
        settings = transport_settings(ot_epsilon=epsilon, ot_iters=iterations)
        for _ in range(5):
            prediction, truth = (star_polygon(rng, rng.randint(3, 20), 300) for _ in range(2))
            assert len(barycentric_targets(prediction, truth, settings)) == len(prediction.bins)


@pytest.mark.req("M-9")
def test_the_result_does_not_depend_on_where_a_vertex_list_starts() -> None:
    rng = random.Random(1)
    for _ in range(40):
        prediction, truth = (star_polygon(rng, rng.randint(3, 10), 150) for _ in range(2))
        expected = barycentric_targets(prediction, truth, DEFAULTS)
        shift = rng.randrange(1, len(prediction.bins) // 2)
        turned = barycentric_targets(rotate(prediction, shift), rotate(truth, shift + 1), DEFAULTS)
        assert turned == expected[2 * shift :] + expected[: 2 * shift]


@pytest.mark.req("M-9")
def test_the_points_of_a_boundary_are_the_same_wherever_its_list_starts() -> None:
    square = make_polygon(bins=(0, 0, 100, 0, 100, 100, 0, 100))
    expected = boundary_of(square, 7, 4.0)  # three points for four equal edges: a tie
    for vertices in range(1, 4):
        turned = boundary_of(rotate(square, vertices), 7, 4.0)
        assert np.array_equal(turned.points, expected.points)
        assert np.array_equal(turned.vertex_rows, np.roll(expected.vertex_rows, -vertices))


@pytest.mark.req("M-9")
@pytest.mark.parametrize(
    "settings", [DEFAULTS, transport_settings(ot_cost="l1", ot_points=40, ot_epsilon=5.0)]
)
def test_a_batch_gives_what_each_pair_gives_alone(settings: TransportSettings) -> None:
    predictions, truth = random_objects(3, 30, 0.6), random_objects(4, 30, 0.6)
    pairs = list(zip(predictions, truth, strict=True))
    together = targets_of_pairs(pairs, settings)
    assert together == [barycentric_targets(*pair, settings) for pair in pairs]
    for (prediction, _), target in zip(pairs, together, strict=True):
        assert target is not None
        assert len(target) == len(prediction.bins)
        assert all(0 <= value <= 999 for value in target)


def test_no_pairs_give_no_targets() -> None:
    assert targets_of_pairs([], DEFAULTS) == []


@pytest.mark.req("M-9")
def test_a_target_stays_within_the_ground_truth_and_is_not_blended_with_the_prediction() -> None:
    truth = regular_polygon(8, 40, centre=200)
    for prediction in (regular_polygon(5, 60, centre=700), make_box(bins=(600, 600, 900, 900))):
        assert all(160 <= value <= 240 for value in barycentric_targets(prediction, truth, DEFAULTS))


@pytest.mark.req("M-9")
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 2.0, 50.0])
def test_the_iteration_equals_the_plain_log_domain_one(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(0, 999, (4, 20, 2)), rng.uniform(0, 999, (4, 30, 2))
    cost = np.sqrt(((rows[:, :, None] - columns[:, None]) ** 2).sum(axis=3))
    a, b = rng.dirichlet(np.ones(20), 4), rng.dirichlet(np.ones(30), 4)
    got = barycentric_images(cost, a, b, columns, epsilon, 30)
    for index in range(4):
        expected = plain_log_sinkhorn(cost[index], a[index], b[index], columns[index], epsilon, 30)
        assert got[index] == pytest.approx(expected, abs=1e-6)


@pytest.mark.req("M-9")
def test_two_points_on_two_points_give_the_image_worked_by_hand() -> None:
    # Equal masses and cost [[0, d], [d, 0]]: the plan's rows are (1, q) / (1 + q) with q = exp(-d / eps).
    points = np.array([[[0.0, 0.0], [10.0, 0.0]]])
    cost = np.array([[[0.0, 10.0], [10.0, 0.0]]])
    half = np.array([[0.5, 0.5]])
    q = math.exp(-10.0 / 4.0)
    images = barycentric_images(cost, half, half, points, 4.0, 7)
    assert images[0, :, 0] == pytest.approx([10 * q / (1 + q), 10 / (1 + q)], abs=1e-12)


@pytest.mark.req("M-9")
def test_a_boundary_has_its_vertices_and_mass_by_arc_length() -> None:
    shape = make_polygon(bins=(0, 0, 300, 0, 300, 100, 0, 100))
    boundary = boundary_of(shape, 64, 4.0)
    assert len(boundary.points) == 64
    assert boundary.points[boundary.vertex_rows].ravel().tolist() == list(shape.bins)
    assert boundary.mass.sum() == pytest.approx(1.0)
    inside_top = (boundary.points[:, 1] == 0) & (boundary.points[:, 0] > 0) & (boundary.points[:, 0] < 300)
    first_gap = float(boundary.points[inside_top, 0].min())
    # A corner owns half of the gap next to it, on either side.
    assert boundary.mass[inside_top].sum() == pytest.approx((300 - first_gap) / 800)


@pytest.mark.parametrize(
    "bins",
    [
        (7, 7, 7, 7, 7, 7),
        (0, 0, 0, 0, 50, 20),
        (0, 0, 50, 20, 0, 0),
        (10, 10, 60, 10, 60, 60, 60, 60, 10, 60, 10, 10),
    ],
)
@pytest.mark.req("M-9")
def test_repeated_vertices_get_the_same_image_and_break_nothing(bins: tuple[int, ...]) -> None:
    shape = make_polygon(bins=bins)
    target = barycentric_targets(shape, shape, DEFAULTS)
    points = list(zip(shape.bins[0::2], shape.bins[1::2], strict=True))
    images = list(zip(target[0::2], target[1::2], strict=True))
    for i, point in enumerate(points):
        for j in range(i):
            # Equal points that are not neighbours are apart on the boundary, yet transport treats them alike.
            if points[j] == point:
                assert images[j] == images[i]


@pytest.mark.req("M-9")
def test_more_vertices_than_points_keep_every_vertex() -> None:
    shape = regular_polygon(90, 400)
    assert len(boundary_of(shape, 64, 4.0).points) == 90
    target = barycentric_targets(shape, shape, DEFAULTS)
    assert len(target) == 180
    assert largest_shift(shape, target) <= 1


@pytest.mark.req("M-9")
def test_a_target_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_number(points: Any, *_: Any) -> Any:
        return np.full((*points.shape[:2], 2), np.nan)

    monkeypatch.setattr("consumers.transport_targets.annealed_images", no_number)
    monkeypatch.setattr("consumers.transport_targets.annealed_log_images", no_number)
    pairs = [(make_polygon(), make_polygon()), (make_box(), make_box())]
    assert targets_of_pairs(pairs, DEFAULTS) == [None, list(make_box().bins)]
    with pytest.raises(TargetNotBuilt, match="not finite"):
        barycentric_targets(make_polygon(), make_polygon(), DEFAULTS)


@pytest.mark.parametrize(
    "field, value",
    [
        ("ot_points", 2),
        ("ot_points", True),
        ("ot_iters", 0),
        ("ot_epsilon", 0.0),
        ("ot_epsilon", math.nan),
        ("ot_epsilon", "2"),
        ("ot_cost", "l3"),
    ],
)
@pytest.mark.req("M-9")
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        transport_settings(**{field: value})
