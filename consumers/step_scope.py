"""Divides all segments of one optimizer step into packs and deals the packs to the learner ranks.

Owns the step-budgeted scope of `stage2_ab_training`: nothing is carried over and nothing is dropped. It must
not know records or the broker.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from consumers.packing import PackingError, check_lengths, select_pack
from consumers.window import longest_first, longest_order

NUM_CANDIDATES = 64
"""Segments that one selection looks at; bounds the time for a large step."""

MAX_IDLE_SHARE = 0.05
"""Largest share of rank time that may be idle in favour of fuller packs."""


def pack_step(lengths: Sequence[int], capacity: int, num_ranks: int) -> list[list[list[int]]]:
    """Return, for each rank, its packs as ascending segment
    indices; each pack holds at most `capacity` tokens.

    `lengths` are encoded lengths in tokens, in insertion order; every index is in exactly one pack. The packs
    are as few as the better of two heuristics finds (best fit decreasing; minimum bin slack). Ranks that
    would run one pack fewer than others wait for them; where that idle share is above `MAX_IDLE_SHARE`, the
    segments are spread evenly over one pack count for all ranks instead, which costs no rank a further pack.
    A rank is left without a pack only when there are fewer segments than ranks, and pack counts differ by at
    most one. No segments give empty lists. The same input gives the same answer. Raises as `check_lengths`
    does, and `PackingError` for fewer than one rank.
    """
    if num_ranks < 1:
        raise PackingError(
            f"number of ranks: got {num_ranks}, expected at least 1; set devices.learner_world_size"
        )
    checked = check_lengths(lengths, capacity)
    candidates = [_best_fit_decreasing(checked, capacity), _minimum_slack(checked, capacity)]
    packs = min(candidates, key=len)
    num_even = min(-(-len(packs) // num_ranks) * num_ranks, len(checked))
    num_least = min(num_ranks, len(checked))
    if len(packs) < num_least or len(packs) < (1 - MAX_IDLE_SHARE) * num_even:
        packs = longest_first(checked, capacity, num_even) or _split(packs, checked, num_least)
    return _deal(packs, checked, num_ranks)


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for i in longest_order(lengths):
        place = bisect.bisect_left(rooms, (lengths[i], -1))
        if place == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(i)
        bisect.insort(rooms, (room - lengths[i], pack))
    return packs


def _minimum_slack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Fill one pack after the other around the longest segment left
    (Gupta and Ho 1999), from a spread of lengths."""
    left = longest_order(lengths)
    packs: list[list[int]] = []
    while left:
        places = _spread(len(left))
        chosen = [places[i] for i in select_pack([lengths[left[place]] for place in places], capacity)]
        packs.append([left[place] for place in chosen])
        for place in reversed(chosen):
            left.pop(place)
    return packs


def _spread(num_left: int) -> list[int]:
    """Ascending places, first and last included, evenly spread over `num_left`."""
    if num_left <= NUM_CANDIDATES:
        return list(range(num_left))
    return [i * (num_left - 1) // (NUM_CANDIDATES - 1) for i in range(NUM_CANDIDATES)]


def _split(packs: list[list[int]], lengths: list[int], num_wanted: int) -> list[list[int]]:
    """Halve the fullest pack of two or more segments until there are `num_wanted` packs."""
    packs = list(packs)
    while len(packs) < num_wanted:
        fullest = max((p for p in packs if len(p) > 1), key=lambda p: (sum(lengths[i] for i in p), -min(p)))
        packs.remove(fullest)
        halves = longest_first([lengths[i] for i in fullest], sum(lengths[i] for i in fullest), 2)
        assert halves is not None, "half of a pack always fits where the whole did"
        packs.extend([fullest[i] for i in half] for half in halves)
    return packs


def _deal(packs: list[list[int]], lengths: list[int], num_ranks: int) -> list[list[list[int]]]:
    """Deal in rounds from the fullest pack down; in each round the rank
    with the fewest tokens so far is served first."""
    tokens = {min(pack): sum(lengths[i] for i in pack) for pack in packs}
    ordered = sorted((sorted(pack) for pack in packs), key=lambda pack: (-tokens[pack[0]], pack[0]))
    loads = [0] * num_ranks
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(ordered), num_ranks):
        served = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, pack in zip(served, ordered[start : start + num_ranks], strict=False):
            ranks[rank].append(pack)
            loads[rank] += tokens[pack[0]]
    return [sorted(rank_packs) for rank_packs in ranks]
