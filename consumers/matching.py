"""Matches the objects of a rollout to the ground truth of its image, by overlap alone.

Owns section 5 of the method: candidates, gate, costs and
assignment; it must not know text, tokens or targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from consumers.shapes import (
    MaskCanvas,
    Shape,
    extents,
    pairwise_box_iou,
    pairwise_box_overlap,
    pairwise_squared_centre_distance,
    star_area,
)

RASTER_ERROR: Final = 0.02
"""How far the IoU of two masks may lie above that of the shapes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchSettings:
    """How predictions are matched.

    ``candidate_top_k``: ground-truth shapes looked at for each prediction. ``maskiou_gate``: lowest IoU of
    a pair, in [0, 1]; equal passes. ``maskiou_resolution``: side of the mask canvas in pixels. ``fp_cost``
    and ``fn_cost``: what an unmatched prediction and an unmatched ground-truth object cost, where a pair
    costs 1 - IoU.
    Raises ValueError for a value that is out of range.
    """

    candidate_top_k: int
    maskiou_gate: float
    maskiou_resolution: int
    fp_cost: float
    fn_cost: float

    def __post_init__(self) -> None:
        _require_int("candidate_top_k", self.candidate_top_k, low=1, high=1 << 31)
        _require_int("maskiou_resolution", self.maskiou_resolution, low=2, high=1 << 13)
        _require_real("maskiou_gate", self.maskiou_gate, low=0.0, high=1.0)
        _require_real("fp_cost", self.fp_cost, low=0.0, high=1e9)
        _require_real("fn_cost", self.fn_cost, low=0.0, high=1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchResult:
    """``pairs`` are (prediction index, ground-truth index) by rising prediction; the others rise too.

    ``gating_rejections`` counts candidate pairs whose IoU is below the gate.
    """

    pairs: tuple[tuple[int, int], ...]
    unmatched_predictions: tuple[int, ...]
    unmatched_ground_truth: tuple[int, ...]
    gating_rejections: int


def match_objects(
    predictions: Sequence[Shape], ground_truth: Sequence[Shape], settings: MatchSettings
) -> MatchResult:
    """Assign predictions (P) to ground truth (G), each at most once, at the least total cost.

    ROLLOUT_MATCHING section 5. Without predictions all ground truth is unmatched, and the other way round.
    Among assignments of equal cost the solver's is taken; it is the same for the same input.
    """
    num_predictions, num_truth = len(predictions), len(ground_truth)
    if not num_predictions or not num_truth:
        return _result((), num_predictions, num_truth, 0)
    overlap = candidate_ious(predictions, ground_truth, settings)
    feasible = overlap >= settings.maskiou_gate  # NaN, no candidate, compares false
    rejections = int(np.count_nonzero(overlap < settings.maskiou_gate))
    pairs = _assign(np.where(feasible, 1.0 - overlap, np.inf), settings)
    return _result(pairs, num_predictions, num_truth, rejections)


def candidate_ious(
    predictions: Sequence[Shape], ground_truth: Sequence[Shape], settings: MatchSettings
) -> NDArray[np.float64]:
    """Return the IoU (P, G) of every candidate pair, NaN where a pair is no candidate.

    Box against box is exact in bins; where a polygon takes part both are rasterised, unless their areas and
    extents leave no IoU near the gate: such a pair has its upper bound.
    """
    prediction_xyxy, truth_xyxy = extents(predictions), extents(ground_truth)
    box_iou = pairwise_box_iou(prediction_xyxy, truth_xyxy)
    candidates = _candidates(box_iou, prediction_xyxy, truth_xyxy, settings.candidate_top_k)
    overlap = np.where(candidates, box_iou, np.nan)
    is_poly = np.array([[shape.geometry == "poly" for shape in ground_truth]])
    is_poly = is_poly | np.array([[shape.geometry == "poly"] for shape in predictions])
    if not is_poly.any():
        return overlap
    bound = _iou_bound(predictions, ground_truth, pairwise_box_overlap(prediction_xyxy, truth_xyxy))
    canvas = MaskCanvas(settings.maskiou_resolution)
    by_mask = candidates & is_poly
    overlap[by_mask] = bound[by_mask]
    drawn = by_mask & (bound > 0) & (bound >= settings.maskiou_gate - RASTER_ERROR)
    overlap[drawn] = canvas.ious(
        [(predictions[row], ground_truth[column]) for row, column in np.argwhere(drawn).tolist()]
    )
    return overlap


def _iou_bound(
    predictions: Sequence[Shape], ground_truth: Sequence[Shape], extent_overlap: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what no IoU (P, G) is above, by the areas of the shapes and the overlap of their extents."""
    rows, columns = (
        np.array([math.nan if area is None else area for area in map(star_area, shapes)])
        for shapes in (predictions, ground_truth)
    )
    overlap = np.minimum(np.minimum(rows[:, None], columns[None, :]), extent_overlap)
    union = rows[:, None] + columns[None, :] - overlap
    bound = np.where(np.isnan(union), 1.0, overlap / np.where(union > 0, union, 1.0))
    return np.where(extent_overlap > 0, bound, 0.0)


def _candidates(
    box_iou: NDArray[np.float64],
    prediction_xyxy: NDArray[np.float64],
    truth_xyxy: NDArray[np.float64],
    top_k: int,
) -> NDArray[np.bool_]:
    """Mark (P, G) the ``top_k`` columns of each row by (-IoU, index); by distance where none overlaps."""
    if box_iou.shape[1] <= top_k:
        return np.ones(box_iou.shape, dtype=np.bool_)
    apart = pairwise_squared_centre_distance(prediction_xyxy, truth_xyxy)
    order_by = np.where(box_iou.max(axis=1, keepdims=True) > 0, -box_iou, apart)
    best = np.argsort(order_by, axis=1, kind="stable")[:, :top_k]
    marked = np.zeros(box_iou.shape, dtype=np.bool_)
    np.put_along_axis(marked, best, True, axis=1)
    return marked


def _assign(pair_cost: NDArray[np.float64], settings: MatchSettings) -> tuple[tuple[int, int], ...]:
    """Solve the square matrix [[pairs, fp_cost], [fn_cost, 0]] of size P + G."""
    num_predictions, num_truth = pair_cost.shape
    size = num_predictions + num_truth
    cost = np.zeros((size, size))
    cost[:num_predictions, :num_truth] = pair_cost
    cost[:num_predictions, num_truth:] = settings.fp_cost
    cost[num_predictions:, :num_truth] = settings.fn_cost
    rows, columns = linear_sum_assignment(cost)
    return tuple(
        (row, column)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        if row < num_predictions and column < num_truth
    )


def _result(
    pairs: tuple[tuple[int, int], ...], num_predictions: int, num_truth: int, gating_rejections: int
) -> MatchResult:
    taken_predictions = {row for row, _ in pairs}
    taken_truth = {column for _, column in pairs}
    return MatchResult(
        pairs=pairs,
        unmatched_predictions=tuple(row for row in range(num_predictions) if row not in taken_predictions),
        unmatched_ground_truth=tuple(index for index in range(num_truth) if index not in taken_truth),
        gating_rejections=gating_rejections,
    )


def _require_int(name: str, value: object, *, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"match settings, {name}: got {value!r}, expected a whole number from {low} to {high}"
        )


def _require_real(name: str, value: object, *, low: float, high: float) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= float(str(value)) <= high:
        raise ValueError(f"match settings, {name}: got {value!r}, expected a number from {low:g} to {high:g}")
