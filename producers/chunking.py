"""Divides the rollout requests of one round between servers and learner ranks; whole numbers only."""

from __future__ import annotations

from collections.abc import Sequence


class InfeasibleChunk(ValueError):
    """The servers cannot give every learner rank at least one rollout in one round."""


def chunk_per_rank(decode_batch_size: int, server_world_sizes: Sequence[int], learner_world_size: int) -> int:
    """Return how many rollouts each learner rank asks for in one round: floor(D*S/W).

    D is the most sequences one generation call takes per rollout GPU (`decode_batch_size`), S the sum of the
    servers' world sizes, W the learner world size. Raises `InfeasibleChunk` when D*S < W (no servers
    included) and `ValueError` for values below 1.
    """
    _check(server_world_sizes, learner_world_size)
    if decode_batch_size < 1:
        raise ValueError(f"decode_batch_size: got {decode_batch_size}, expected at least 1")
    num_at_once = decode_batch_size * sum(server_world_sizes)
    if num_at_once < learner_world_size:
        raise InfeasibleChunk(
            f"decode_batch_size {decode_batch_size} on servers with world sizes {list(server_world_sizes)} "
            f"gives {num_at_once} rollouts at once, expected at least one for each of {learner_world_size} "
            "learner ranks; raise custom.extra.rollout_matching.decode_batch_size, add servers, "
            "or use fewer learner ranks"
        )
    return num_at_once // learner_world_size


def slice_requests(
    num_requests_per_rank: int, server_world_sizes: Sequence[int], learner_world_size: int
) -> list[list[int]]:
    """Return a table rank x server: how many of its requests, in their order, each rank sends to each server.

    The global budget (requests per rank times ranks) is shared between servers in proportion to their world
    sizes, by largest remainder (ties to the lower server index). The requests of all ranks in rank order are
    then cut into one contiguous slice per server, so that order is kept: a rank sends its first requests to
    the first server of its row. Row sums are `num_requests_per_rank`, column sums the servers' shares; 0
    requests give a table of zeros. Raises `ValueError` for no server, a world size below 1 or a negative
    number of requests.
    """
    _check(server_world_sizes, learner_world_size)
    if not server_world_sizes:
        raise ValueError("rollout servers: got none, expected at least one; set vllm.server.servers")
    if num_requests_per_rank < 0:
        raise ValueError(f"num_requests_per_rank: got {num_requests_per_rank}, expected 0 or more")
    shares = _largest_remainder(num_requests_per_rank * learner_world_size, server_world_sizes)
    table = []
    for rank in range(learner_world_size):
        rank_start = rank * num_requests_per_rank
        rank_end = rank_start + num_requests_per_rank
        row = []
        server_start = 0
        for share in shares:
            server_end = server_start + share
            row.append(max(0, min(rank_end, server_end) - max(rank_start, server_start)))
            server_start = server_end
        table.append(row)
    return table


def _largest_remainder(budget: int, weights: Sequence[int]) -> list[int]:
    total = sum(weights)
    shares = [budget * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(budget * weights[i] % total), i))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def _check(server_world_sizes: Sequence[int], learner_world_size: int) -> None:
    if learner_world_size < 1:
        raise ValueError(f"learner_world_size: got {learner_world_size}, expected at least 1")
    for position, size in enumerate(server_world_sizes):
        if size < 1:
            raise ValueError(f"world size of rollout server {position}: got {size}, expected at least 1")
