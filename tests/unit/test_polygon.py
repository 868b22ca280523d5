"""Canonical polygons: one spelling for one shape."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.method.polygon import (
    canonical_polygon,
    signed_doubled_area,
    vertices_of,
)
from tests.builders.polygons import is_canonical

coordinate = st.integers(0, 999)
flat_polygons = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=12).map(
    lambda vertices: [value for vertex in vertices for value in vertex]
)


def canonical_or_none(bins: list[int]) -> tuple[int, ...] | None:
    try:
        return canonical_polygon(bins)
    except ValueError:
        return None


def test_a_square_written_anticlockwise_becomes_clockwise_from_its_top_left() -> None:
    assert canonical_polygon([10, 10, 10, 90, 90, 90, 90, 10]) == (10, 10, 90, 10, 90, 90, 10, 90)


def test_the_closing_vertex_and_repeats_in_a_row_go_away() -> None:
    assert canonical_polygon([1, 2, 30, 4, 30, 4, 15, 60, 1, 2]) == (1, 2, 30, 4, 15, 60)


def test_of_two_top_most_vertices_the_left_one_comes_first() -> None:
    assert canonical_polygon([80, 5, 40, 70, 20, 5])[:2] == (20, 5)


@pytest.mark.parametrize(
    "bins, reason",
    [
        ([1, 2, 3], "even number"),
        ([], "0 distinct vertices"),
        ([1, 1, 5, 5, 1, 1], "2 distinct vertices"),
        ([0, 0, 10, 10, 20, 20], "without area"),
    ],
)
def test_what_encloses_nothing_is_refused_with_the_reason(bins: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        canonical_polygon(bins)
    assert not is_canonical(bins)


@settings(max_examples=200, deadline=None)
@given(flat_polygons, st.integers(0, 11), st.booleans(), st.booleans())
def test_start_direction_and_closing_do_not_change_the_canonical_spelling(
    bins: list[int], rotation: int, is_reversed: bool, is_closed: bool
) -> None:
    expected = canonical_or_none(bins)
    vertices = vertices_of(bins)
    rotation %= len(vertices)
    respelled = vertices[rotation:] + vertices[:rotation]
    if is_reversed:
        respelled.reverse()
    if is_closed:
        respelled.append(respelled[0])
    assert canonical_or_none([value for vertex in respelled for value in vertex]) == expected


@settings(max_examples=200, deadline=None)
@given(flat_polygons)
def test_the_canonical_spelling_is_clockwise_top_left_first_and_stays_as_it_is(bins: list[int]) -> None:
    canonical = canonical_or_none(bins)
    if canonical is None:
        return
    vertices = vertices_of(canonical)
    assert is_canonical(canonical)
    assert signed_doubled_area(vertices) > 0
    assert signed_doubled_area(vertices) == abs(signed_doubled_area(vertices_of(bins)))
    assert (vertices[0][1], vertices[0][0]) == min((y, x) for x, y in vertices)
    assert set(vertices) == set(vertices_of(bins))
