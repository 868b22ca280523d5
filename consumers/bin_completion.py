"""Divides lengths into bins exactly: bin by bin, around the longest length left, fullest fillings first.

Owns the search and its work bound; it must not know segments, packs or why a division is wanted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Final

Filling = tuple[int, ...]

FIRST_SHARE: Final = 0.25
"""Share of the work for the search in order; the rest goes to restarts that draw fillings by lot."""
NUM_RESTARTS: Final = 80
DRAWN_AT_ONCE: Final = 6


class WorkExhausted(Exception):
    """The work bound was reached before the search had an answer."""


def complete_bins(lengths: list[int], capacity: int, num_bins: int, max_work: int) -> list[Filling] | None:
    """Return at most ``num_bins`` fillings of positions into ``lengths``, each within ``capacity``, or None.

    ``lengths`` fall. Every bin takes the longest length left with others, such that what it leaves empty
    fits what may still be left empty (bin completion, Korf 2003). None means that no division exists; raises
    WorkExhausted where ``max_work`` steps did not decide. The same input gives the same answer.
    """
    first = int(max_work * FIRST_SHARE)
    try:
        return _Search(lengths, capacity, first, None).run(num_bins)
    except WorkExhausted:
        pass
    for seed in range(NUM_RESTARTS):
        try:
            return _Search(lengths, capacity, (max_work - first) // NUM_RESTARTS, random.Random(seed)).run(
                num_bins
            )
        except WorkExhausted:
            continue
    raise WorkExhausted


class _Search:
    """Depth-first over bins; what is left after a bin is tried once."""

    def __init__(self, lengths: list[int], capacity: int, max_work: int, lot: random.Random | None) -> None:
        self._lengths = lengths
        self._capacity = capacity
        self._work_left = max_work
        self._lot = lot
        self._hopeless: set[tuple[int, ...]] = set()

    def run(self, num_bins: int) -> list[Filling] | None:
        chosen: list[Filling] = []
        left = [list(range(len(self._lengths)))]
        untried = [self._fillings(left[0], num_bins)]
        while untried:
            filling = next(untried[-1], None)
            if filling is None:
                untried.pop()
                self._hopeless.add(self._key(left.pop()))
                if chosen:
                    chosen.pop()
                continue
            taken = set(filling)
            rest = [position for position in left[-1] if position not in taken]
            if not rest:
                return [*chosen, filling]
            if self._key(rest) in self._hopeless:
                continue
            chosen.append(filling)
            left.append(rest)
            untried.append(self._fillings(rest, num_bins - len(chosen)))
        return None

    def _key(self, left: list[int]) -> tuple[int, ...]:
        return tuple(self._lengths[position] for position in left)

    def _fillings(self, left: list[int], num_bins: int) -> Iterator[Filling]:
        """Yield fillings of one bin with the longest length in ``left``, fullest first."""
        if not left or not num_bins:
            return
        longest, others = left[0], left[1:]
        room = self._capacity - self._lengths[longest]
        total = sum(self._lengths[position] for position in others)
        least = max(total - (num_bins - 1) * self._capacity, 0)
        self._spend(len(left))
        reach = self._reach(others, room)
        # A bin that takes all the rest is never worse.
        sums: Iterator[int] = iter([total]) if total <= room else _falling_bits(reach[0], least)
        for value in sums if self._lot is None else _drawn(sums, self._lot):
            for chosen in self._subsets(others, reach, value):
                yield (longest, *chosen)

    def _reach(self, others: list[int], room: int) -> list[int]:
        """Bit t of entry i is set iff some of ``others[i:]`` add up to t, at most ``room``."""
        mask = (1 << (room + 1)) - 1
        reach = [1]
        for position in reversed(others):
            reach.append((reach[-1] | reach[-1] << self._lengths[position]) & mask)
        reach.reverse()
        return reach

    def _subsets(self, others: list[int], reach: list[int], value: int) -> Iterator[Filling]:
        """Yield each multiset of lengths with that sum once, the longest first."""
        steps: list[tuple[int, int, Filling]] = [(0, value, ())]
        while steps:
            place, missing, chosen = steps.pop()
            self._spend(1)
            if not missing:
                yield chosen
                continue
            length = self._lengths[others[place]]
            after = place + 1
            while after < len(others) and self._lengths[others[after]] == length:
                after += 1
            taking = (place + 1, missing - length, (*chosen, others[place]))
            can_take = missing >= length and (reach[place + 1] >> (missing - length)) & 1
            can_skip = (reach[after] >> missing) & 1
            if can_skip:
                steps.append((after, missing, chosen))
            if can_take:
                steps.append(taking)
            if can_take and can_skip and self._lot is not None and self._lot.random() < 0.3:
                steps[-1], steps[-2] = steps[-2], steps[-1]

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise WorkExhausted


def _falling_bits(value: int, least: int) -> Iterator[int]:
    """Yield the places of the bits of ``value`` that are set, from the highest down to ``least``."""
    value >>= least
    while value:
        place = value.bit_length() - 1
        yield place + least
        value ^= 1 << place


def _drawn(sums: Iterator[int], lot: random.Random) -> Iterator[int]:
    """Exchange neighbours by lot: fuller fillings still come before much emptier ones."""
    while some := list(islice(sums, DRAWN_AT_ONCE)):
        lot.shuffle(some)
        yield from some
