"""Chunks and slices of rollout requests."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producers.chunking import InfeasibleChunk, chunk_per_rank, slice_requests

server_sizes = st.lists(st.integers(1, 8), min_size=1, max_size=6)


@pytest.mark.req("S-4")
@pytest.mark.parametrize(
    ("decode_batch_size", "servers", "world_size", "chunk"),
    [(4, [1, 1, 1, 1, 1, 1], 2, 12), (4, [1, 1], 3, 2), (4, [4, 2], 2, 12), (1, [1], 1, 1)],
)
def test_a_chunk_is_the_rank_s_part_of_what_all_servers_take_at_once(
    decode_batch_size: int, servers: list[int], world_size: int, chunk: int
) -> None:
    assert chunk_per_rank(decode_batch_size, servers, world_size) == chunk


@pytest.mark.req("S-4")
def test_fewer_rollouts_at_once_than_ranks_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        InfeasibleChunk, match=r"size 1 on servers .*\[1, 1\] gives 2 .* each of 4 learner ranks"
    ):
        chunk_per_rank(1, [1, 1], 4)
    with pytest.raises(InfeasibleChunk, match="gives 0 rollouts at once"):
        chunk_per_rank(4, [], 1)


@pytest.mark.req("S-4")
def test_requests_are_cut_into_contiguous_slices_per_rank() -> None:
    assert slice_requests(12, [4, 2], 2) == [[12, 0], [4, 8]]


@pytest.mark.req("S-4")
def test_a_remainder_goes_to_the_largest_fraction_and_ties_to_the_first_server() -> None:
    assert slice_requests(5, [1, 1], 1) == [[3, 2]]
    assert slice_requests(5, [1, 3], 1) == [[1, 4]]  # 1.25 and 3.75
    assert slice_requests(0, [1, 3], 2) == [[0, 0], [0, 0]]


@pytest.mark.req("S-3", "S-4")
@given(decode_batch_size=st.integers(1, 8), servers=server_sizes, world_size=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_no_server_is_asked_for_more_than_it_takes_at_once(
    decode_batch_size: int, servers: list[int], world_size: int
) -> None:
    if decode_batch_size * sum(servers) < world_size:
        with pytest.raises(InfeasibleChunk):
            chunk_per_rank(decode_batch_size, servers, world_size)
        return

    chunk = chunk_per_rank(decode_batch_size, servers, world_size)
    table = slice_requests(chunk, servers, world_size)

    asked = [sum(row[server] for row in table) for server in range(len(servers))]
    assert all(count <= decode_batch_size * size for count, size in zip(asked, servers, strict=True))
    assert chunk >= 1
    assert (chunk + 1) * world_size > decode_batch_size * sum(servers)


@pytest.mark.req("S-4")
@given(num_requests=st.integers(0, 40), servers=server_sizes, world_size=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_shares_are_proportional_and_order_is_kept(
    num_requests: int, servers: list[int], world_size: int
) -> None:
    table = slice_requests(num_requests, servers, world_size)

    assert [sum(row) for row in table] == [num_requests] * world_size
    budget = num_requests * world_size
    for server, size in enumerate(servers):
        share = sum(row[server] for row in table)
        assert abs(share - budget * size / sum(servers)) < 1
    # Read rank after rank, the server index never goes down: one contiguous slice for each server.
    asked_servers = [server for row in table for server, count in enumerate(row) for _ in range(count)]
    assert asked_servers == list(accumulate(asked_servers, max))


@pytest.mark.parametrize(
    ("num_requests", "servers", "world_size", "message"),
    [
        (1, [], 1, "rollout servers: got none"),
        (-1, [1], 1, "num_requests_per_rank: got -1"),
        (1, [1, 0], 1, "rollout server 1: got 0"),
        (1, [1], 0, "learner_world_size: got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    num_requests: int, servers: list[int], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        slice_requests(num_requests, servers, world_size)


def test_a_decode_batch_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_batch_size: got 0, expected at least 1"):
        chunk_per_rank(0, [1], 1)
