"""Matching and targets written down plainly: one pair at a time, whole masks, log-domain Sinkhorn.

The yardstick of `rollstream bench matching`; it must not share code with what it is compared to.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from broker_schemas.records.records import GroundTruthObject

TOP_K, GATE, RESOLUTION = 10, 0.3, 256
NUM_POINTS, EPSILON_SQUARED_BINS, NUM_ITERATIONS = 64, 20.0, 50


def reference_pairs(
    predictions: Sequence[GroundTruthObject], ground_truth: Sequence[GroundTruthObject]
) -> list[tuple[int, int]]:
    """Return the matched (prediction, ground truth) pairs of section 5 at its default settings."""
    num_predictions, num_truth = len(predictions), len(ground_truth)
    cost = np.zeros((num_predictions + num_truth, num_predictions + num_truth))
    cost[:num_predictions, :num_truth] = np.inf
    cost[:num_predictions, num_truth:] = cost[num_predictions:, :num_truth] = 1.0
    for row, prediction in enumerate(predictions):
        for column in _candidates(prediction, ground_truth):
            overlap = _iou(prediction, ground_truth[column])
            if overlap >= GATE:
                cost[row, column] = 1.0 - overlap
    rows, columns = linear_sum_assignment(cost)
    solved = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(row, column) for row, column in solved if row < num_predictions and column < num_truth]


def reference_target(prediction: GroundTruthObject, truth: GroundTruthObject) -> list[int]:
    """Return the target bins of section 6 for one pair; points lie evenly along each edge."""
    if prediction.geometry == truth.geometry == "bbox_2d":
        return list(truth.bins)
    points, mass, vertex_rows = _boundary(_corners(prediction))
    others, other_mass, _ = _boundary(_corners(truth))
    centred, others_centred = points - mass @ points, others - other_mass @ others
    cost = ((centred[:, None] - others_centred[None]) ** 2).sum(axis=2) / EPSILON_SQUARED_BINS
    columns = np.zeros(len(others))
    for _ in range(NUM_ITERATIONS):
        rows = np.log(mass) - _log_sum_exp(columns[None] - cost, axis=1)
        columns = np.log(other_mass) - _log_sum_exp(rows[:, None] - cost, axis=0)
    plan = np.exp(rows[:, None] + columns[None] - cost)
    images = plan @ others / plan.sum(axis=1, keepdims=True)
    if prediction.geometry == "bbox_2d":
        moved = np.concatenate([images.min(axis=0), images.max(axis=0)])
    else:
        moved = images[vertex_rows].ravel()
    bins: list[int] = np.clip(np.rint(moved), 0, 999).astype(int).tolist()
    return bins


def _log_sum_exp(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    largest = values.max(axis=axis, keepdims=True)
    summed: NDArray[np.float64] = np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)
    return summed


def _candidates(prediction: GroundTruthObject, ground_truth: Sequence[GroundTruthObject]) -> list[int]:
    extent = _extent(prediction)
    overlaps = [_box_iou(extent, _extent(truth)) for truth in ground_truth]
    if max(overlaps) > 0:
        return sorted(range(len(ground_truth)), key=lambda index: (-overlaps[index], index))[:TOP_K]
    apart = [_squared_distance(extent, _extent(truth)) for truth in ground_truth]
    return sorted(range(len(ground_truth)), key=lambda index: (apart[index], index))[:TOP_K]


def _iou(prediction: GroundTruthObject, truth: GroundTruthObject) -> float:
    if prediction.geometry == truth.geometry == "bbox_2d":
        return _box_iou(_extent(prediction), _extent(truth))
    one, other = _mask(prediction), _mask(truth)
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def _mask(shape: GroundTruthObject) -> NDArray[np.bool_]:
    outline = (_corners(shape) * ((RESOLUTION - 1) / 999)).ravel().tolist()
    encoded = coco_mask.frPyObjects([outline], RESOLUTION, RESOLUTION)
    with warnings.catch_warnings():
        # pycocotools 2.0.11 hands numpy 2 an array type that knows no `copy`; the mask itself is right.
        warnings.simplefilter("ignore", DeprecationWarning)
        mask: NDArray[np.bool_] = coco_mask.decode(encoded)[:, :, 0].astype(np.bool_)
    return mask


def _extent(shape: GroundTruthObject) -> tuple[int, int, int, int]:
    xs, ys = shape.bins[0::2], shape.bins[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _box_iou(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)) - width * height
    return width * height / area if area else 0.0


def _squared_distance(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    return sum((one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) ** 2 for axis in (0, 1))


def _corners(shape: GroundTruthObject) -> NDArray[np.float64]:
    if shape.geometry == "poly":
        return np.array(shape.bins, dtype=np.float64).reshape(-1, 2)
    x1, y1, x2, y2 = shape.bins
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], dtype=np.float64)


def _boundary(corners: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    edges = np.roll(corners, -1, axis=0) - corners
    lengths = np.sqrt((edges**2).sum(axis=1))
    shares = np.floor(lengths / lengths.sum() * (NUM_POINTS - len(corners))).astype(int)
    points: list[Any] = []
    vertex_rows = []
    for corner, edge, share in zip(corners, edges, shares, strict=True):
        vertex_rows.append(len(points))
        points += [corner + edge * part / (share + 1) for part in range(share + 1)]
    placed = np.array(points)
    steps = np.sqrt(((np.roll(placed, -1, axis=0) - placed) ** 2).sum(axis=1))
    mass = steps + np.roll(steps, 1)
    return placed, mass / mass.sum(), vertex_rows
