"""Divides a window by exchange: two packs at a time are divided anew until none is over its capacity.

Owns that heuristic alone; it must not know segments or why a division is wanted. It finds divisions of many
packs with few segments each, where a search in order has no end, and can never say that there is none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Final

HOTTEST: Final = 0.02
"""Share of the capacity by which an exchange may make two packs worse at first; it falls to nothing."""
NUM_COOLINGS: Final = 4


def repair_by_exchange(
    lengths: Sequence[int], capacity: int, start: Sequence[Sequence[int]], max_work: int
) -> list[list[int]] | None:
    """Return ``start``, packs of positions into ``lengths``, changed until all are within ``capacity``.

    None where ``max_work`` did not do. A pack over its capacity and another, drawn by lot, are divided anew;
    no pack becomes empty, and the same input gives the same answer. Work counts divisions looked at.
    """
    lot = random.Random(0)
    packs = [list(pack) for pack in start]
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    work_left = max_work
    while work_left > 0:
        over = [index for index, load in enumerate(loads) if load > capacity]
        if not over:
            return packs
        phase = (work_left / max_work * NUM_COOLINGS) % 1
        one = lot.choice(over)
        other = lot.randrange(len(packs) - 1)
        other += other >= one
        members = [*packs[one], *packs[other]]
        total = loads[one] + loads[other]
        before = _excess(loads[one], total, capacity)
        work_left -= len(members) ** 3
        worst = before + HOTTEST * capacity * phase**2 * lot.random()
        left = _divide(lengths, members, total, capacity, worst, lot)
        if left is None:
            continue
        chosen = set(left)
        packs[one], packs[other] = left, [i for i in members if i not in chosen]
        loads[one] = sum(lengths[i] for i in left)
        loads[other] = total - loads[one]
    return None


def _excess(load: int, total: int, capacity: int) -> int:
    return max(0, load - capacity) + max(0, total - load - capacity)


def _divide(
    lengths: Sequence[int], members: list[int], total: int, capacity: int, worst: float, lot: random.Random
) -> list[int] | None:
    """Return one side of a division, by lot among the feasible ones, else those no worse than ``worst``."""
    found: list[list[int]] = []
    best = worst
    num = len(members)
    for size in range(max(1, num // 2 - 1), num // 2 + 2):
        if size >= num:
            break
        for chosen in combinations(members, size):
            excess = _excess(sum(lengths[i] for i in chosen), total, capacity)
            if excess == 0 and best > 0:
                best, found = 0, []
            if excess <= best:
                found.append(list(chosen))
    return lot.choice(found) if found else None
