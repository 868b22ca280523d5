"""Geometry of shapes in bins: extents, exact box overlap and rasterised mask overlap.

Owns what a shape is to matching and transport; it must not know costs or assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MIN_PIXELS: Final = 16
MAX_RESOLUTION: Final = 4096


class Shape(Protocol):
    """``geometry`` is ``bbox_2d`` with ``bins`` (x1, y1, x2, y2), or ``poly`` with flat (x, y) pairs."""

    @property
    def geometry(self) -> str: ...

    @property
    def bins(self) -> tuple[int, ...]: ...


def extents(shapes: Sequence[Shape]) -> NDArray[np.float64]:
    """Return the bounding boxes (N, 4) xyxy of ``shapes`` in bins; no shapes give (0, 4)."""
    rows = [
        shape.bins
        if shape.geometry == "bbox_2d"
        else (min(shape.bins[0::2]), min(shape.bins[1::2]), max(shape.bins[0::2]), max(shape.bins[1::2]))
        for shape in shapes
    ]
    return np.asarray(rows, dtype=np.float64).reshape(-1, 4)


def pairwise_box_overlap(
    rows_xyxy: NDArray[np.float64], cols_xyxy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the area (P, G) that boxes (P, 4) and (G, 4) share."""
    low = np.maximum(rows_xyxy[:, None, :2], cols_xyxy[None, :, :2])
    high = np.minimum(rows_xyxy[:, None, 2:], cols_xyxy[None, :, 2:])
    sides = np.maximum(high - low, 0.0)
    overlap: NDArray[np.float64] = sides[..., 0] * sides[..., 1]
    return overlap


def pairwise_box_iou(rows_xyxy: NDArray[np.float64], cols_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the exact IoU (P, G) of boxes (P, 4) and (G, 4); a box without area has IoU 0."""
    overlap = pairwise_box_overlap(rows_xyxy, cols_xyxy)
    union = _areas(rows_xyxy)[:, None] + _areas(cols_xyxy)[None, :] - overlap
    iou: NDArray[np.float64] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou


def _areas(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0.0)
    areas: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return areas


def pairwise_squared_centre_distance(
    rows_xyxy: NDArray[np.float64], cols_xyxy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return four times the squared distance (P, G) between box centres: whole numbers, so ties are exact."""
    row_centres = rows_xyxy[:, :2] + rows_xyxy[:, 2:]
    col_centres = cols_xyxy[:, :2] + cols_xyxy[:, 2:]
    apart = row_centres[:, None] - col_centres[None, :]
    squared: NDArray[np.float64] = apart[..., 0] ** 2 + apart[..., 1] ** 2
    return squared


def corners(shape: Shape) -> NDArray[np.float64]:
    """Return the vertices (V, 2) of a shape in bins; a box gives its corners, clockwise from top left."""
    if shape.geometry == "poly":
        return np.asarray(shape.bins, dtype=np.float64).reshape(-1, 2)
    x1, y1, x2, y2 = shape.bins
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], dtype=np.float64)


def is_degenerate(shape: Shape) -> bool:
    """Whether a shape has no inside: an empty or inverted box, a polygon whose vertices lie on one line."""
    if shape.geometry == "bbox_2d":
        x1, y1, x2, y2 = shape.bins
        return x2 <= x1 or y2 <= y1
    arms = corners(shape) - corners(shape)[0]
    longest = arms[np.argmax((arms**2).sum(axis=1))]
    return bool(np.all(arms[:, 0] * longest[1] == arms[:, 1] * longest[0]))


def star_area(shape: Shape) -> float | None:
    """Return the area of a box, or of a polygon that is a star around its vertices' mean, else None.

    Such a polygon does not cross itself, so that the sum over its edges is the area that a mask fills.
    """
    if shape.geometry == "bbox_2d":
        x1, y1, x2, y2 = shape.bins
        return float(max(x2 - x1, 0) * max(y2 - y1, 0))
    number = len(shape.bins) // 2
    x, y = sum(shape.bins[0::2]) / number, sum(shape.bins[1::2]) / number
    arms = [(px - x, py - y) for px, py in zip(shape.bins[0::2], shape.bins[1::2], strict=True)]
    around = list(zip(arms, [*arms[1:], arms[0]], strict=True))
    twice = [ax * by - bx * ay for (ax, ay), (bx, by) in around]
    num_upward = sum(ay < 0 <= by for (_, ay), (_, by) in around)
    is_star = num_upward == 1 and (min(twice) > 0 or max(twice) < 0)
    return abs(sum(twice)) / 2 if is_star else None


class MaskCanvas:
    """Rasterises pairs of shapes on a square canvas over their common extent, so that thin ones are seen."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution

    def iou(self, one: Shape, other: Shape) -> float:
        """Return the mask IoU of two shapes; a degenerate one gives 0, two equal ones 1.

        A sliver that fills no pixel of the canvas is looked at on a finer one, up to MAX_RESOLUTION.
        """
        if is_degenerate(one) or is_degenerate(other):
            return 0.0
        if one.geometry == other.geometry and tuple(one.bins) == tuple(other.bins):
            return 1.0
        x1, y1, x2, y2 = _union(one, other)
        side = self._resolution
        while True:
            scale = np.array([(side - 1) / (x2 - x1), (side - 1) / (y2 - y1)])
            masks = [_rasterise((corners(shape) - (x1, y1)) * scale, side) for shape in (one, other)]
            finer = 4 * side
            if min(coco_mask.area(masks)) >= MIN_PIXELS or finer > MAX_RESOLUTION:
                return float(np.nan_to_num(coco_mask.iou(masks[:1], masks[1:], [0])[0][0]))
            side = finer


def _union(one: Shape, other: Shape) -> list[float]:
    boxes = extents([one, other])
    union: list[float] = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]
    return union


def _rasterise(outline: NDArray[np.float64], side: int) -> Any:
    return coco_mask.frPyObjects([outline.ravel().tolist()], side, side)[0]
