"""Geometry of shapes in bins: extents, exact box overlap and rasterised mask overlap.

Owns what a shape is to matching and transport; it must not know costs or assignments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MIN_PIXELS: Final = 16
MAX_RESOLUTION: Final = 4096
AREAS_AT_ONCE: Final = 128
"""pycocotools fails above 255."""


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
    (x0, y0), *others = zip(shape.bins[0::2], shape.bins[1::2], strict=True)
    arms = [(x - x0, y - y0) for x, y in others if (x, y) != (x0, y0)]
    return all(x * arms[0][1] == y * arms[0][0] for x, y in arms)


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

    def ious(self, pairs: Sequence[tuple[Shape, Shape]]) -> list[float]:
        """Return the mask IoU of each pair of shapes; a degenerate one gives 0, two equal ones 1.

        A sliver that fills no pixel of the canvas is looked at on a finer one, up to MAX_RESOLUTION.
        """
        shapes = {id(shape): shape for pair in pairs for shape in pair}
        outlines = {place: _Outline.of(shape) for place, shape in shapes.items()}
        found = [0.0] * len(pairs)
        waiting = []
        for index, (one, other) in enumerate(pairs):
            first, second = outlines[id(one)], outlines[id(other)]
            if first.is_degenerate or second.is_degenerate:
                continue
            if one.geometry == other.geometry and tuple(one.bins) == tuple(other.bins):
                found[index] = 1.0
            else:
                waiting.append((index, first, second))
        side = self._resolution
        while waiting:
            masks = _rasterise([(first, second) for _, first, second in waiting], side)
            areas = _areas_of(masks)
            is_last, too_small = 4 * side > MAX_RESOLUTION, []
            for place, job in enumerate(waiting):
                if min(areas[2 * place], areas[2 * place + 1]) < MIN_PIXELS and not is_last:
                    too_small.append(job)
                    continue
                iou = float(coco_mask.iou([masks[2 * place]], [masks[2 * place + 1]], [0])[0, 0])
                found[job[0]] = 0.0 if math.isnan(iou) else iou
            waiting, side = too_small, 4 * side
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outline:
    """A shape ready to be drawn: its vertices (V, 2) in bins and their extent (x1, y1, x2, y2)."""

    points: NDArray[np.float64]
    extent: tuple[float, float, float, float]
    is_degenerate: bool

    @classmethod
    def of(cls, shape: Shape) -> _Outline:
        extent: tuple[float, float, float, float] = tuple(extents([shape])[0].tolist())
        return cls(points=corners(shape), extent=extent, is_degenerate=is_degenerate(shape))


def _rasterise(pairs: Sequence[Sequence[_Outline]], side: int) -> Any:
    """Return the masks of one, other, one, other and so on, each pair on a canvas over its common extent."""
    drawn = []
    for one, other in pairs:
        x1, y1 = map(min, one.extent[:2], other.extent[:2])
        x2, y2 = map(max, one.extent[2:], other.extent[2:])
        scale = np.array([(side - 1) / (x2 - x1), (side - 1) / (y2 - y1)])
        drawn += [((outline.points - (x1, y1)) * scale).ravel().tolist() for outline in (one, other)]
    return coco_mask.frPyObjects(drawn, side, side)


def _areas_of(masks: Sequence[Any]) -> list[int]:
    parts = [masks[start : start + AREAS_AT_ONCE] for start in range(0, len(masks), AREAS_AT_ONCE)]
    return [int(area) for part in parts for area in coco_mask.area(part)]
