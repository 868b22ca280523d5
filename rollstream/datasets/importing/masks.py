"""Masks to shapes: run-length counts and bitmaps to the outline, hull or box of what they cover. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rollstream.datasets.importing.drafts import AnnotationProblem, MaskMode
from rollstream.datasets.importing.polygons import FloatArray, convex_hull, join_polygons, signed_area

MAX_PIXELS: Final = 1 << 28
SMALLEST_PART: Final = 0.01
"""Share of the largest part under which another part is a speck."""
Shape = tuple[Literal["bbox_2d", "poly"], tuple[float, ...]]


def decode_run_lengths(mask: object, size: tuple[int, int] | None) -> NDArray[np.bool_]:
    """Return the bitmap (height, width) of a COCO mask: ``counts`` as a list or as packed text, ``size``.

    Counts run down the columns and begin with background. Raises AnnotationProblem for counts that do not
    fill the size exactly, or a size that is not that of the image (width, height).
    """
    if not isinstance(mask, dict):
        raise AnnotationProblem("mask", f"got {mask!r:.60}, expected counts and size")
    shape = mask.get("size")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int for side in shape):
        raise AnnotationProblem("mask", f"size: got {shape!r:.60}, expected [height, width]")
    height, width = shape
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise AnnotationProblem("mask", f"size: got {height}x{width}, expected 1 to {MAX_PIXELS} pixels")
    if size is not None and (width, height) != size:
        raise AnnotationProblem(
            "mask", f"size: got {width}x{height}, expected the image's {size[0]}x{size[1]}"
        )
    counts = mask.get("counts")
    runs = _unpack(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise AnnotationProblem("mask", f"counts: got {counts!r:.60}, expected run lengths")
    if sum(runs) != height * width:
        raise AnnotationProblem("mask", f"counts: got {sum(runs)} pixels in all, expected {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _unpack(text: str) -> list[int]:
    """Return the run lengths of COCO's packed text: base 32 digits, lowest first, differences from the third.

    Raises AnnotationProblem for a character outside the code or a number that does not end.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise AnnotationProblem("mask", f"counts: got {character!r} in them, expected packed run lengths")
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise AnnotationProblem("mask", "counts: the text ends inside a number")
    return runs


def bitmap_parts(bitmap: NDArray[np.bool_], offset: tuple[float, float] = (0.0, 0.0)) -> list[FloatArray]:
    """Return the outer outlines of ``bitmap`` along pixel edges, largest first, holes filled, no specks.

    Pixel (0, 0) covers 0..1 in both directions, moved by ``offset``. Pixels that touch at a corner alone are
    parts of their own. Empty for an empty bitmap.
    """
    following = _edges(bitmap)
    loops: list[FloatArray] = []
    while following:
        loop = _trace(following)
        if signed_area(loop) > 0:
            loops.append(loop + np.asarray(offset))
    loops.sort(key=lambda loop: -signed_area(loop))
    return [loop for loop in loops if signed_area(loop) >= SMALLEST_PART * signed_area(loops[0])]


def _edges(bitmap: NDArray[np.bool_]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return where each border edge leads, the covered pixel on its right (clockwise, y down)."""
    padded = np.pad(np.asarray(bitmap, dtype=bool), 1)
    inner = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (
        (inner & ~padded[:-2, 1:-1], (0, 0), (1, 0)),
        (inner & ~padded[1:-1, 2:], (1, 0), (1, 1)),
        (inner & ~padded[2:, 1:-1], (1, 1), (0, 1)),
        (inner & ~padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    for border, (x0, y0), (x1, y1) in sides:
        for y, x in np.argwhere(border).tolist():
            following.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    return following


def _trace(following: dict[tuple[int, int], list[tuple[int, int]]]) -> FloatArray:
    """Take one closed loop of edges out of ``following``; return its corners."""
    start = next(iter(following))
    corners: list[tuple[int, int]] = []
    point, heading = start, (0, 0)
    while True:
        ends = following[point]
        # two edges leave where pixels touch at a corner: the right turn stays with the pixel it came along
        right = (point[0] - heading[1], point[1] + heading[0])
        end = right if right in ends else ends[0]
        ends.remove(end)
        if not ends:
            del following[point]
        turn = (end[0] - point[0], end[1] - point[1])
        if turn != heading:
            corners.append(point)
        point, heading = end, turn
        if point == start:
            return np.asarray(corners, dtype=np.float64)


def shape_of_parts(parts: Sequence[FloatArray], mode: MaskMode) -> Shape:
    """Return what an object of ``parts`` becomes: one outline of all, their convex hull, or their box.

    Raises AnnotationProblem where there is no part with an area.
    """
    solid = [part for part in parts if len(part) >= 3 and abs(signed_area(part)) > 0]
    if not solid:
        raise AnnotationProblem("degenerate", "mask or parts: enclose nothing, expected an area")
    corners = np.concatenate(solid)
    if mode == "box":
        (x1, y1), (x2, y2) = corners.min(axis=0), corners.max(axis=0)
        return "bbox_2d", (float(x1), float(y1), float(x2), float(y2))
    outline = join_polygons(solid) if mode == "outline" else convex_hull(corners)
    return "poly", tuple(float(value) for value in outline.reshape(-1))


def polygon_part(values: Sequence[Any]) -> FloatArray:
    """Return flat numbers as (V, 2)."""
    return np.asarray(values, dtype=np.float64).reshape(-1, 2)
