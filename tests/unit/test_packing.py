"""Selection of one pack: brute force for small inputs, invariants for random ones."""

from __future__ import annotations

import random
import sys
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.packing import (
    SELECTION_METHODS,
    BinpackingMissing,
    OversizedSegment,
    PackingError,
    SelectionMethod,
    require_method,
    select_pack,
)

CAPACITY = 40
lengths_lists = st.lists(st.integers(min_value=1, max_value=CAPACITY), min_size=1, max_size=30)


def fifo_greedy(lengths: list[int], capacity: int) -> list[int]:
    chosen: list[int] = []
    for i, length in enumerate(lengths):
        if sum(lengths[j] for j in chosen) + length <= capacity:
            chosen.append(i)
    return chosen


def best_by_brute_force(lengths: list[int], capacity: int) -> list[int]:
    """Largest total of all subsets with the oldest; of equals the lexicographically smallest."""
    others = range(1, len(lengths))
    subsets = ([0, *rest] for size in range(len(lengths)) for rest in combinations(others, size))
    fitting = [subset for subset in subsets if sum(lengths[i] for i in subset) <= capacity]
    return min(fitting, key=lambda subset: (-sum(lengths[i] for i in subset), subset))


def reachable_maximum(lengths: list[int], capacity: int) -> int:
    """The optimum by a plain table of sums, for inputs too large for all subsets."""
    sums = {lengths[0]}
    for length in lengths[1:]:
        sums |= {total + length for total in sums if total + length <= capacity}
    return max(sums)


@pytest.mark.req("P-1", "P-2")
@pytest.mark.parametrize("seed", range(150))
def test_exact_equals_brute_force_over_all_subsets(seed: int) -> None:
    generator = random.Random(seed)
    capacity = generator.randint(5, 60)
    lengths = [generator.randint(1, capacity) for _ in range(generator.randint(1, 10))]

    assert select_pack(lengths, capacity) == best_by_brute_force(lengths, capacity)


@pytest.mark.req("P-1", "P-2")
@pytest.mark.parametrize("method", SELECTION_METHODS)
@given(lengths=lengths_lists)
@settings(max_examples=200, deadline=None)
def test_a_pack_holds_the_oldest_fits_and_is_in_insertion_order(
    method: SelectionMethod, lengths: list[int]
) -> None:
    chosen = select_pack(lengths, CAPACITY, method)

    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(lengths[i] for i in chosen) <= CAPACITY
    assert select_pack(list(lengths), CAPACITY, method) == chosen


@pytest.mark.req("P-2")
@pytest.mark.parametrize("method", SELECTION_METHODS)
@given(lengths=lengths_lists)
@settings(max_examples=200, deadline=None)
def test_fifo_is_kept_unless_strictly_beaten(method: SelectionMethod, lengths: list[int]) -> None:
    fifo = fifo_greedy(lengths, CAPACITY)

    chosen = select_pack(lengths, CAPACITY, method)

    gain = sum(lengths[i] for i in chosen) - sum(lengths[i] for i in fifo)
    assert gain >= 0
    assert gain > 0 or chosen == fifo
    if method == "fifo":
        assert chosen == fifo


@pytest.mark.req("P-2")
@given(lengths=lengths_lists)
@settings(max_examples=100, deadline=None)
def test_exact_is_never_worse_than_binpacking(lengths: list[int]) -> None:
    exact, binpacking = (
        sum(lengths[i] for i in select_pack(lengths, CAPACITY, method)) for method in ("exact", "binpacking")
    )

    assert exact >= binpacking


@pytest.mark.req("P-1", "P-2")
@pytest.mark.parametrize("seed", range(4))
def test_512_segments_reach_the_exact_optimum(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(2000, 6000) for _ in range(512)]

    chosen = select_pack(lengths, 16384)

    assert sum(lengths[i] for i in chosen) == reachable_maximum(lengths, 16384)


@pytest.mark.req("P-2")
def test_binpacking_beats_fifo_where_fifo_leaves_a_gap() -> None:
    lengths = [4, 3, 5, 1]  # fifo: 4 + 3 + 1; constant volume 6 around the oldest: {5}, {3, 1}

    assert select_pack(lengths, 10, "fifo") == [0, 1, 3]
    assert select_pack(lengths, 10, "binpacking") == [0, 2]
    assert select_pack(lengths, 10, "exact") == [0, 2, 3]


@pytest.mark.req("P-1")
def test_among_equal_totals_older_segments_go_first() -> None:
    lengths = [4, 5, 3, 6, 3, 3]  # 4 + 6, 4 + 3 + 3: all make 10; fifo makes 9

    assert select_pack(lengths, 10) == [0, 2, 4]


@pytest.mark.req("P-1")
@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_no_segments_give_an_empty_pack(method: SelectionMethod) -> None:
    assert select_pack([], 10, method) == []


@pytest.mark.req("P-1")
@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_an_oldest_that_fills_the_pack_goes_alone(method: SelectionMethod) -> None:
    assert select_pack([10, 1, 2], 10, method) == [0]


@pytest.mark.req("P-1")
def test_lengths_from_an_array_are_taken_as_whole_numbers() -> None:
    np = pytest.importorskip("numpy")

    assert select_pack(np.array([70, 50, 20, 60], dtype=np.int32), 130) == [0, 3]


@pytest.mark.req("P-4")
def test_an_oversized_segment_is_refused_with_advice() -> None:
    with pytest.raises(
        OversizedSegment, match=r"index 1: got 11 tokens, expected at most .* 10.*global_max_length"
    ):
        select_pack([3, 11], 10)


@pytest.mark.req("P-3")
def test_missing_binpacking_fails_fast_and_says_what_to_install_or_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "binpacking", None)

    with pytest.raises(BinpackingMissing, match=r"pip install binpacking.*'exact'.*'fifo'"):
        select_pack([], 10, "binpacking")
    with pytest.raises(BinpackingMissing):
        require_method("binpacking")
    assert select_pack([3, 4, 7], 10) == [0, 2]


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 0], 10, "index 1: got 0 tokens, expected at least 1"),
        ([3], 0, "pack capacity: got 0 tokens, expected at least 1"),
        ([3.5], 10, "whole numbers of tokens"),
    ],
)
def test_values_that_are_no_lengths_are_refused(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(PackingError, match=message):
        select_pack(lengths, capacity)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PackingError, match="got 'best', expected one of exact, binpacking, fifo"):
        select_pack([3], 10, "best")  # type: ignore[arg-type]
