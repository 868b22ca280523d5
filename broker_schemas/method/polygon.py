"""Canonical polygons: one spelling for one shape.

Canonical means no repeated vertex in a row (so no closing vertex), clockwise as seen on the screen
(y points down), and starting at the top-most, then left-most vertex.
"""

from __future__ import annotations

from collections.abc import Sequence

Vertex = tuple[int, int]


def canonical_polygon(bins: Sequence[int]) -> tuple[int, ...]:
    """Return the canonical spelling of the flat polygon ``bins`` (x1, y1, x2, y2, …).

    A shape that passes its start vertex more than once takes the smallest of the possible spellings.
    Raises ValueError for an odd number of values, fewer than three distinct vertices, or no area.
    """
    vertices = _without_repeats(vertices_of(bins))
    if len(set(vertices)) < 3:
        raise ValueError(f"got {len(set(vertices))} distinct vertices, expected at least 3")
    doubled_area = signed_doubled_area(vertices)
    if doubled_area == 0:
        raise ValueError("got a polygon without area, expected one that encloses something")
    if doubled_area < 0:
        vertices.reverse()
    first = min(vertices, key=_top_then_left)
    spellings = [
        vertices[start:] + vertices[:start] for start, vertex in enumerate(vertices) if vertex == first
    ]
    return tuple(value for vertex in min(spellings) for value in vertex)


def vertices_of(bins: Sequence[int]) -> list[Vertex]:
    """Return the (x, y) pairs of a flat list; raises ValueError for an odd number of values."""
    if len(bins) % 2:
        raise ValueError(f"got {len(bins)} values, expected an even number")
    return list(zip(bins[0::2], bins[1::2], strict=True))


def signed_doubled_area(vertices: Sequence[Vertex]) -> int:
    """Return twice the area by the shoelace formula, positive for clockwise with y pointing down."""
    following = [*vertices[1:], *vertices[:1]]
    return sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(vertices, following, strict=True))


def _without_repeats(vertices: list[Vertex]) -> list[Vertex]:
    kept = [vertex for index, vertex in enumerate(vertices) if index == 0 or vertex != vertices[index - 1]]
    while len(kept) > 1 and kept[-1] == kept[0]:
        kept.pop()
    return kept


def _top_then_left(vertex: Vertex) -> tuple[int, int]:
    return vertex[1], vertex[0]
