"""Turns the boundaries of shapes into points with mass, so that they can be transported onto each other.

Owns where the points lie and what each weighs; it must not know costs or transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consumers.shapes import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """``points`` (N, 2) in bins, ``mass`` (N,) positive of sum 1; ``points[vertex_rows]`` are vertices.

    ``spacing`` is the shortest distance between neighbouring points, 0 for a single point;
    ``squared_radius`` the mean squared distance of its points from their mass centre.
    """

    points: NDArray[np.float64]
    mass: NDArray[np.float64]
    vertex_rows: NDArray[np.int64]
    spacing: float
    squared_radius: float


def boundaries_of(
    shapes: Sequence[Shape],
    num_points: int,
    clearance_bins: float = 0.0,
    clear_spacings: Sequence[float] | None = None,
) -> list[Boundary]:
    """Return the boundary of each shape as ``num_points`` points that include its vertices (V).

    A shape with more distinct vertices than that keeps them all; a shape that is a single point gives that
    point. The points and their order do not depend on where the vertex list starts. ``vertex_rows`` (V,)
    follow the shape's own order. No point lies within ``clearance_bins``, nor within a shape's
    ``clear_spacings`` of its mean spacing, of a vertex along its edge, where the edge is long enough: the
    vertex then has the mass of all that. Every point has the mass of half the boundary to either neighbour.
    """
    if not shapes:
        return []
    first, listed, edges, distinct, row_of_corner = _distinct_corners(shapes)
    steps = distinct[edges.after] - distinct
    lengths = np.sqrt((steps**2).sum(axis=1))
    perimeters = np.add.reduceat(lengths, edges.starts)
    spacings = np.zeros(len(shapes)) if clear_spacings is None else np.asarray(clear_spacings)
    clear = np.maximum(clearance_bins, spacings * perimeters / num_points)[edges.owner]
    counts = _share_out(num_points, lengths, edges, clear)
    ends = np.cumsum(counts + 1)
    rows = ends - counts - 1  # of the distinct vertices
    edge_of_point = np.repeat(np.arange(len(distinct)), counts + 1)
    place = np.arange(ends[-1]) - rows[edge_of_point]
    fraction = _fractions(lengths, counts, clear, edge_of_point, place)
    points = distinct[edge_of_point] + fraction[:, None] * steps[edge_of_point]
    cycles = _Cycles.of(np.add.reduceat(counts + 1, edges.starts))
    mass, spacing = _arc_mass(points, cycles)
    radii = _squared_radii(points, mass, cycles)
    vertex_rows = (rows - cycles.starts[edges.owner])[edges.starts[listed.owner] + row_of_corner]
    return [
        Boundary(
            points=points[cycles.starts[i] : cycles.ends[i]],
            mass=mass[cycles.starts[i] : cycles.ends[i]],
            vertex_rows=_from(
                vertex_rows[listed.starts[i] : listed.ends[i]], int(listed.sizes[i]) - first[i]
            ),
            spacing=float(spacing[i]),
            squared_radius=float(radii[i]),
        )
        for i in range(len(shapes))
    ]


def _distinct_corners(
    shapes: Sequence[Shape],
) -> tuple[list[int], _Cycles, _Cycles, NDArray[np.float64], NDArray[np.int64]]:
    """Lay the vertices of all shapes in a row, each from its canonical start, without repeated ones.

    Returns that start for each shape, the cycles as listed and without repeats, the latter's vertices (E, 2),
    and for each listed vertex its place in its shape's cycle.
    """
    outlines = [_outline(shape) for shape in shapes]
    first = [_canonical_start(outline) for outline in outlines]
    turned = [outline[2 * k :] + outline[: 2 * k] for outline, k in zip(outlines, first, strict=True)]
    corners = np.array(list(chain.from_iterable(turned)), dtype=np.float64).reshape(-1, 2)
    listed = _Cycles.of([len(outline) // 2 for outline in outlines])
    is_new = (corners != corners[listed.before]).any(axis=1)
    is_new[listed.starts] |= ~np.logical_or.reduceat(is_new, listed.starts)  # a single point, repeated
    edges = _Cycles.of(np.add.reduceat(is_new, listed.starts, dtype=np.int64))
    place = (np.cumsum(is_new) - 1 - edges.starts[listed.owner]) % edges.sizes[listed.owner]
    return first, listed, edges, corners[is_new], place


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cycles:
    """Cycles laid one after the other: for each element its ``owner`` and its neighbours' places."""

    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owner: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]

    @classmethod
    def of(cls, sizes: Sequence[int] | NDArray[np.int64]) -> _Cycles:
        sizes = np.asarray(sizes, dtype=np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        places = np.arange(ends[-1])
        before, after = places - 1, places + 1
        before[starts], after[ends - 1] = ends - 1, starts
        owner = np.repeat(np.arange(len(sizes)), sizes)
        return cls(sizes=sizes, starts=starts, ends=ends, owner=owner, before=before, after=after)


def _outline(shape: Shape) -> list[int]:
    """Return the vertices as flat (x, y) pairs; a box gives its corners, clockwise from top left."""
    if shape.geometry == "poly":
        return list(shape.bins)
    x1, y1, x2, y2 = shape.bins
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def _canonical_start(outline: list[int]) -> int:
    """Return the start of the smallest rotation by (y, x): the same cycle wherever the list starts."""
    cycle = list(zip(outline[1::2], outline[0::2], strict=True))
    least = min(cycle)
    first = cycle.index(least)
    if cycle.count(least) == 1:
        return first
    starts = [index for index, point in enumerate(cycle) if point == least]
    return min(starts, key=lambda index: cycle[index:] + cycle[:index])


def _from(cycle: NDArray[Any], start: int) -> NDArray[Any]:
    """Return a cycle as it reads from ``start`` on (``numpy.roll`` takes ten times as long)."""
    return np.concatenate([cycle[start:], cycle[:start]])


def _share_out(
    num_points: int, lengths: NDArray[np.float64], edges: _Cycles, clearance: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Share the points of each shape among its edges in proportion to what is free of clearance.

    By largest remainder; a shape without edges of any length gets none.
    """
    free = np.maximum(lengths - 2 * clearance, 0.0)
    has_free = np.add.reduceat(free, edges.starts) > 0
    weights = np.where(has_free[edges.owner], free, lengths)
    totals = np.add.reduceat(weights, edges.starts)
    extra = np.where(totals > 0, np.maximum(num_points - edges.sizes, 0), 0)
    quotas = weights / np.where(totals > 0, totals, 1.0)[edges.owner] * extra[edges.owner]
    counts = np.floor(quotas).astype(np.int64)
    missing = extra - np.add.reduceat(counts, edges.starts)
    order = np.lexsort((counts - quotas, edges.owner))
    rank = np.arange(len(order)) - edges.starts[edges.owner]
    counts[order] += rank < missing[edges.owner]
    return counts


def _fractions(
    lengths: NDArray[np.float64],
    counts: NDArray[np.int64],
    clearance: NDArray[np.float64],
    edge_of_point: NDArray[np.int64],
    place: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return where on its edge each point (N,) lies, from 0 to below 1; ``place`` 0 is the vertex itself.

    The others are spread evenly between two margins, a single one lies in the middle.
    """
    even = 1.0 / (counts + 1)
    clear = clearance / np.where(lengths > 0, lengths, 1.0)
    margin = np.maximum(even, np.minimum(clear, 0.5 - 0.25 * even))
    margin[counts == 1] = 0.5
    gap = (1.0 - 2.0 * margin) / np.maximum(counts - 1, 1)
    spread: NDArray[np.float64] = margin[edge_of_point] + (place - 1) * gap[edge_of_point]
    return np.where(place == 0, 0.0, spread)


def _arc_mass(
    points: NDArray[np.float64], cycles: _Cycles
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mass of each point and, for each cycle, its shortest step."""
    steps = points[cycles.after] - points
    after = np.sqrt((steps**2).sum(axis=1))
    around = after + after[cycles.before]
    totals = np.add.reduceat(around, cycles.starts)
    is_point = totals == 0
    around[cycles.starts[is_point]] = 1.0
    mass: NDArray[np.float64] = around / np.where(is_point, 1.0, totals)[cycles.owner]
    return mass, np.minimum.reduceat(after, cycles.starts)


def _squared_radii(
    points: NDArray[np.float64], mass: NDArray[np.float64], cycles: _Cycles
) -> NDArray[np.float64]:
    centres = np.add.reduceat(points * mass[:, None], cycles.starts)
    apart = ((points - centres[cycles.owner]) ** 2).sum(axis=1)
    radii: NDArray[np.float64] = np.add.reduceat(apart * mass, cycles.starts)
    return radii
