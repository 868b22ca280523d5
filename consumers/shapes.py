"""Geometry of shapes in bins: extents, exact box overlap and rasterised mask overlap.

Owns what a shape is to matching and transport; it must not know costs or assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from broker_schemas.method.coordinates import LARGEST_BIN


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


def pairwise_box_iou(rows_xyxy: NDArray[np.float64], cols_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the exact IoU (P, G) of boxes (P, 4) and (G, 4); a box without area has IoU 0."""
    low = np.maximum(rows_xyxy[:, None, :2], cols_xyxy[None, :, :2])
    high = np.minimum(rows_xyxy[:, None, 2:], cols_xyxy[None, :, 2:])
    sides = np.maximum(high - low, 0.0)
    overlap = sides[..., 0] * sides[..., 1]
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


class MaskCanvas:
    """Rasterises shapes on a square canvas, each at most once; a bin v lies at v * (resolution - 1) / 999."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution
        self._masks: dict[tuple[str, tuple[int, ...]], Any] = {}

    def ious(self, shape: Shape, others: Sequence[Shape]) -> NDArray[np.float64]:
        """Return the mask IoU (N,) of ``shape`` with each of ``others``; a degenerate shape gives 0."""
        found = np.zeros(len(others))
        present = [index for index, other in enumerate(others) if self._mask(other) is not None]
        mask = self._mask(shape)
        if mask is not None and present:
            masks = [self._mask(others[index]) for index in present]
            found[present] = coco_mask.iou([mask], masks, [0] * len(masks))[0]
        return found

    def _mask(self, shape: Shape) -> Any:
        key = (shape.geometry, tuple(shape.bins))
        if key not in self._masks:
            self._masks[key] = None if is_degenerate(shape) else self._rasterise(shape)
        return self._masks[key]

    def _rasterise(self, shape: Shape) -> Any:
        side = self._resolution
        outline = (corners(shape) * ((side - 1) / LARGEST_BIN)).ravel().tolist()
        return coco_mask.frPyObjects([outline], side, side)[0]
