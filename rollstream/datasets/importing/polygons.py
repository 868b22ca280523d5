"""Polygons in the plane: clipped, joined, enclosed by a hull, simplified. Pure; (V, 2), not closed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def signed_area(vertices: FloatArray) -> float:
    """Return the area by the shoelace formula, positive for clockwise with y pointing down."""
    x, y = vertices[:, 0], vertices[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2


def clip_polygon(vertices: FloatArray, width: float, height: float) -> FloatArray:
    """Return ``vertices`` cut to 0..width and 0..height (Sutherland and Hodgman); empty when outside.

    Parts that the frame separates stay joined along its border.
    """
    for axis, bound, sign in ((0, 0.0, 1.0), (0, width, -1.0), (1, 0.0, 1.0), (1, height, -1.0)):
        vertices = _clip_side(vertices, axis, bound, sign)
    return vertices


def _clip_side(vertices: FloatArray, axis: int, bound: float, sign: float) -> FloatArray:
    kept: list[FloatArray] = []
    for index, point in enumerate(vertices):
        before = vertices[index - 1]
        is_in, was_in = (sign * (item[axis] - bound) >= 0 for item in (point, before))
        if is_in != was_in:
            share = (bound - before[axis]) / (point[axis] - before[axis])
            crossing = before + share * (point - before)
            crossing[axis] = bound
            kept.append(crossing)
        if is_in:
            kept.append(point)
    return np.asarray(kept, dtype=np.float64).reshape(-1, 2)


def convex_hull(points: FloatArray) -> FloatArray:
    """Return the convex hull of ``points`` (N, 2), clockwise with y down (monotone chain)."""
    ordered = sorted({(float(x), float(y)) for x, y in points})
    if len(ordered) < 3:
        return np.asarray(ordered, dtype=np.float64).reshape(-1, 2)
    halves = []
    for sequence in (ordered, ordered[::-1]):
        half: list[tuple[float, float]] = []
        for point in sequence:
            while len(half) >= 2 and _turn(half[-2], half[-1], point) <= 0:
                half.pop()
            half.append(point)
        halves += half[:-1]
    return np.asarray(halves, dtype=np.float64)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def join_polygons(parts: Sequence[FloatArray]) -> FloatArray:
    """Return one polygon that follows every part, joined by bridges of no width; the area is their sum.

    Each next part is the one nearest to what is joined already; ``parts`` are not empty.
    """
    turned = [part if signed_area(part) >= 0 else part[::-1] for part in parts]
    turned.sort(key=lambda part: -abs(signed_area(part)))
    joined, rest = turned[0], turned[1:]
    while rest:
        gaps = [_nearest(joined, part) for part in rest]
        index = min(range(len(rest)), key=lambda number: gaps[number][0])
        _, ours, theirs = gaps[index]
        part = np.roll(rest.pop(index), -theirs, axis=0)
        joined = np.concatenate([joined[: ours + 1], part, part[:1], joined[ours:]])
    return joined


def _nearest(ours: FloatArray, theirs: FloatArray) -> tuple[float, int, int]:
    squares = ((ours[:, None, :] - theirs[None, :, :]) ** 2).sum(axis=2)
    flat = int(np.argmin(squares))
    first, second = divmod(flat, len(theirs))
    return float(squares[first, second]), first, second


def simplify_polygon(vertices: FloatArray, tolerance: float) -> FloatArray:
    """Return the vertices that shape ``vertices`` to within ``tolerance`` (Douglas and Peucker).

    It starts at the top-most vertex and the one farthest from it. A shape that would lose its area, or has
    no vertex to lose, comes back as it is.
    """
    if tolerance <= 0 or len(vertices) <= 4:
        return vertices
    start = int(np.lexsort((vertices[:, 0], vertices[:, 1]))[0])
    ring = np.roll(vertices, -start, axis=0)
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.argmax(np.linalg.norm(ring - ring[0], axis=1)))
    kept, open_chords = {0, far}, [(0, far), (far, len(ring))]
    while open_chords:
        first, last = open_chords.pop()
        offset, middle = _worst_vertex(closed, first, last)
        if offset > tolerance:
            kept.add(middle)
            open_chords += [(first, middle), (middle, last)]
    chosen = ring[sorted(kept)]
    if len(chosen) < 3 or abs(signed_area(chosen)) < 0.5 * abs(signed_area(vertices)):
        return vertices
    return vertices if len(chosen) == len(vertices) else chosen


def _worst_vertex(points: FloatArray, first: int, last: int) -> tuple[float, int]:
    """Return (distance, index) of the vertex farthest from the chord; distance 0 if there is none."""
    if last - first < 2:
        return 0.0, first
    chord = points[last] - points[first]
    offsets = points[first + 1 : last] - points[first]
    length = float(np.dot(chord, chord))
    shares = np.clip(offsets @ chord / length, 0.0, 1.0) if length else np.zeros(len(offsets))
    distances = np.linalg.norm(offsets - shares[:, None] * chord, axis=1)
    farthest = int(np.argmax(distances))
    return float(distances[farthest]), first + 1 + farthest
