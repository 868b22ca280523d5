"""Turns the boundary of a shape into points with mass, so that it can be transported onto another.

Owns where the points lie and what each weighs; it must not know costs or transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consumers.shapes import Shape, corners


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """``points`` (N, 2) in bins, ``mass`` (N,) positive of sum 1; ``points[vertex_rows]`` are vertices."""

    points: NDArray[np.float64]
    mass: NDArray[np.float64]
    vertex_rows: NDArray[np.int64]


def boundary_of(shape: Shape, num_points: int, clearance_bins: float) -> Boundary:
    """Return the boundary of ``shape`` as ``num_points`` points that include its vertices (V).

    A shape with more distinct vertices than that keeps them all; a shape that is a single point gives that
    point. The points and their order do not depend on where the vertex list starts. ``vertex_rows`` (V,)
    follow the shape's own order. No point lies within ``clearance_bins`` of a vertex along its edge, where
    the edge is long enough: entropic transport blurs over that distance and would pull the image of the
    vertex inwards. Every point has the mass of half the boundary to either neighbour.
    """
    vertices = corners(shape)
    first = _canonical_start(vertices)
    distinct, row_of_vertex = _merge_repeated(_from(vertices, first))
    if len(distinct) == 1:
        return Boundary(points=distinct, mass=np.ones(1), vertex_rows=np.zeros(len(vertices), dtype=np.int64))
    edges = _from(distinct, 1) - distinct
    lengths = np.sqrt((edges**2).sum(axis=1))
    counts = _share_out(max(num_points - len(distinct), 0), lengths, clearance_bins)
    ends = np.cumsum(counts + 1)
    rows = ends - counts - 1  # of the distinct vertices
    edge_of_point = np.repeat(np.arange(len(distinct)), counts + 1)
    place = np.arange(ends[-1]) - rows[edge_of_point]
    fraction = _fractions(lengths, counts, clearance_bins, edge_of_point, place)
    points = distinct[edge_of_point] + fraction[:, None] * edges[edge_of_point]
    vertex_rows = _from(rows[row_of_vertex], len(vertices) - first)
    return Boundary(points=points, mass=_arc_mass(points), vertex_rows=vertex_rows)


def _from(cycle: NDArray[Any], start: int) -> NDArray[Any]:
    """Return a cycle as it reads from ``start`` on (``numpy.roll`` takes ten times as long)."""
    return np.concatenate([cycle[start:], cycle[:start]])


def _canonical_start(vertices: NDArray[np.float64]) -> int:
    """Return the start of the smallest rotation by (y, x): the same cycle wherever the list starts."""
    cycle = [(y, x) for x, y in vertices.tolist()]
    least = min(cycle)
    starts = [index for index, point in enumerate(cycle) if point == least]
    return min(starts, key=lambda index: cycle[index:] + cycle[:index])


def _merge_repeated(vertices: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Drop vertices equal to the one before them; also return each vertex's row among those that are left."""
    is_new = np.any(vertices != _from(vertices, len(vertices) - 1), axis=1)
    if not is_new.any():
        return vertices[:1], np.zeros(len(vertices), dtype=np.int64)
    distinct = vertices[is_new]
    rows: NDArray[np.int64] = (np.cumsum(is_new) - 1) % len(distinct)
    return distinct, rows


def _share_out(num_extra: int, lengths: NDArray[np.float64], clearance_bins: float) -> NDArray[np.int64]:
    """Share points among edges in proportion to what is free of clearance, by largest remainder."""
    free = np.maximum(lengths - 2 * clearance_bins, 0.0)
    weights = free if free.sum() > 0 else lengths
    quotas = weights / weights.sum() * num_extra
    counts: NDArray[np.int64] = np.floor(quotas).astype(np.int64)
    missing = num_extra - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
    return counts


def _fractions(
    lengths: NDArray[np.float64],
    counts: NDArray[np.int64],
    clearance_bins: float,
    edge_of_point: NDArray[np.int64],
    place: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return where on its edge each point (N,) lies, from 0 to below 1; ``place`` 0 is the vertex itself.

    The others are spread evenly between two margins, a single one lies in the middle.
    """
    even = 1.0 / (counts + 1)
    margin = np.maximum(even, np.minimum(clearance_bins / lengths, 0.5 - 0.25 * even))
    margin[counts == 1] = 0.5
    gap = (1.0 - 2.0 * margin) / np.maximum(counts - 1, 1)
    spread: NDArray[np.float64] = margin[edge_of_point] + (place - 1) * gap[edge_of_point]
    return np.where(place == 0, 0.0, spread)


def _arc_mass(points: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = _from(points, 1) - points
    after = np.sqrt((steps**2).sum(axis=1))
    around = after + _from(after, len(after) - 1)
    mass: NDArray[np.float64] = around / around.sum()
    return mass
