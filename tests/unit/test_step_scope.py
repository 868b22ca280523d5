"""Step scope: everything of one optimizer step, over all ranks, evenly."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.packing import OversizedSegment, PackingError
from consumers.step_scope import pack_step

CAPACITY = 50


def loads_per_rank(ranks: list[list[list[int]]], lengths: list[int]) -> list[int]:
    return [sum(lengths[i] for pack in packs for i in pack) for packs in ranks]


@pytest.mark.req("S-7", "P-1")
@given(
    lengths=st.lists(st.integers(1, CAPACITY), max_size=60),
    num_ranks=st.integers(1, 9),
)
@settings(max_examples=300, deadline=None)
def test_everything_is_packed_once_and_pack_counts_differ_by_one_at_most(
    lengths: list[int], num_ranks: int
) -> None:
    ranks = pack_step(lengths, CAPACITY, num_ranks)

    assert len(ranks) == num_ranks
    packs = [pack for rank_packs in ranks for pack in rank_packs]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(pack and pack == sorted(pack) for pack in packs)
    assert all(sum(lengths[i] for i in pack) <= CAPACITY for pack in packs)
    counts = [len(rank_packs) for rank_packs in ranks]
    assert max(counts) - min(counts) <= 1
    assert counts.count(0) == max(0, num_ranks - len(lengths))
    assert all(rank_packs == sorted(rank_packs) for rank_packs in ranks)
    assert pack_step(list(lengths), CAPACITY, num_ranks) == ranks


@pytest.mark.req("S-7")
def test_an_uneven_number_of_packs_gives_ranks_different_counts() -> None:
    lengths = [CAPACITY] * 5

    assert [len(packs) for packs in pack_step(lengths, CAPACITY, 2)] == [3, 2]


@pytest.mark.req("S-7")
def test_few_packs_are_spread_so_that_no_rank_runs_twice_as_long_as_another() -> None:
    lengths = [10] * 45  # nine full packs for eight ranks: one rank would run two, the others one

    ranks = pack_step(lengths, CAPACITY, 8)

    assert {len(packs) for packs in ranks} == {2}
    loads = loads_per_rank(ranks, lengths)
    assert max(loads) - min(loads) <= 10


@pytest.mark.req("S-7")
def test_fewer_packs_than_ranks_are_split_so_that_every_rank_works() -> None:
    assert pack_step([10, 10, 10], CAPACITY, 3) == [[[0]], [[1]], [[2]]]


@pytest.mark.req("S-7")
def test_fewer_segments_than_ranks_leave_the_last_ranks_idle() -> None:
    assert pack_step([10, 20], CAPACITY, 3) == [[[1]], [[0]], []]
    assert pack_step([], CAPACITY, 2) == [[], []]


@pytest.mark.req("S-7")
@pytest.mark.parametrize("capacity", [8192, 12000, 16384])
@pytest.mark.parametrize(("shape", "least_fill"), [("lognormal", 0.98), ("uniform", 0.95)])
def test_1024_segments_for_8_ranks_are_filled_well(capacity: int, shape: str, least_fill: float) -> None:
    for seed in range(4):
        generator = random.Random(seed)
        lengths = [
            generator.randint(2000, 6000)
            if shape == "uniform"
            else max(64, min(capacity, round(generator.lognormvariate(7.6, 0.67))))
            for _ in range(1024)
        ]

        ranks = pack_step(lengths, capacity, 8)

        assert sum(lengths) / (capacity * sum(len(packs) for packs in ranks)) >= least_fill
        loads = loads_per_rank(ranks, lengths)
        assert min(loads) / max(loads) > 0.94


def test_bad_input_is_refused_before_anything_is_packed() -> None:
    with pytest.raises(PackingError, match="number of ranks: got 0, expected at least 1"):
        pack_step([1], CAPACITY, 0)
    with pytest.raises(OversizedSegment, match="index 1: got 51 tokens"):
        pack_step([1, 51], CAPACITY, 1)
