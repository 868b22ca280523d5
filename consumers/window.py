"""Divides all segments of one accumulation window into exactly the wanted number of packs.

Owns the division alone: a balanced heuristic first, an exact search with bounded work behind it. It must not
know records, ranks or the broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from consumers.bin_completion import WorkExhausted, complete_bins
from consumers.packing import OVERSIZED_ADVICE, OversizedSegment, PackingError, check_lengths, select_pack
from consumers.window_repair import repair_by_exchange

MAX_SEARCH_WORK = 600_000
"""Work bound of the exact search, in steps; about half a second on one core."""

MAX_EXCHANGE_WORK = 900_000
"""Work bound of the exchange between packs, in divisions; about half a second on one core."""
SURE_SEGMENTS = 32
"""Up to so many the exact search has its answer; above it, exchange comes first."""

InfeasibleReason = Literal["sum_over_capacity", "fewer_segments_than_packs", "indivisible"]


class InfeasibleWindow(PackingError):
    """No division into the wanted packs exists; `reason` says why, the message says what to change."""

    def __init__(self, reason: InfeasibleReason, message: str) -> None:
        super().__init__(message)
        self.reason: InfeasibleReason = reason


class WindowSearchExhausted(PackingError):
    """The search reached its work bound: whether the window is feasible is not known."""

    reason: Literal["search_exhausted"] = "search_exhausted"


def schedule_window(
    lengths: Sequence[int], capacity: int, num_packs: int, *, max_search_work: int = MAX_SEARCH_WORK
) -> list[list[int]]:
    """Divide all segments into exactly `num_packs` non-empty packs of at most `capacity` tokens each.

    `lengths` are encoded lengths in tokens, in insertion order. Every index is in exactly one pack; indices
    ascend in a pack, packs are ordered by their first index, and the same input always gives the same answer.
    Longest processing time first (Graham 1969) gives balanced packs. Where it does not fit, packs are filled
    one after the other; where that does not fit either, packs exchange segments (above SURE_SEGMENTS) and an
    exact search decides; all are evened out afterwards. Raises `InfeasibleWindow` with one of three reasons
    (no segments at all are `fewer_segments_than_packs`), `WindowSearchExhausted` if `max_search_work` did not
    decide, and `PackingError` for values below 1.
    """
    if num_packs < 1:
        raise PackingError(f"number of packs in a window: got {num_packs}, expected at least 1")
    checked = _check_window(lengths, capacity, num_packs)
    packs = longest_first(checked, capacity, num_packs)
    if packs is None:
        packs = (
            _one_by_one(checked, capacity, num_packs)
            or _exchange(checked, capacity, num_packs)
            or _search(checked, capacity, num_packs, max_search_work)
        )
        _fill_empty(packs, checked)
        _even_out(packs, checked)
    return sorted(sorted(members) for members in packs)


def _check_window(lengths: Sequence[int], capacity: int, num_packs: int) -> list[int]:
    try:
        checked = check_lengths(lengths, capacity)
    except OversizedSegment as exc:
        raise InfeasibleWindow("indivisible", f"window of {num_packs} packs: {exc}") from exc
    where = f"window of {len(checked)} segments for {num_packs} packs of {capacity} tokens"
    total = sum(checked)
    if total > num_packs * capacity:
        raise InfeasibleWindow(
            "sum_over_capacity",
            f"{where}: got {total} tokens, expected at most {num_packs * capacity}; "
            "lower training.effective_batch_size, raise gradient_accumulation_steps (more packs) or "
            "training.global_max_length, or use post_rollout_pack_scope: micro, which carries leftovers",
        )
    if len(checked) < num_packs:
        raise InfeasibleWindow(
            "fewer_segments_than_packs",
            f"{where}: got {len(checked)} segments, expected at least {num_packs}, "
            "since no pack may be empty; raise training.effective_batch_size or lower "
            "gradient_accumulation_steps",
        )
    return checked


def longest_order(lengths: list[int]) -> list[int]:
    """Indices from the longest segment to the shortest; equal lengths oldest first."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def longest_first(lengths: list[int], capacity: int, num_packs: int) -> list[list[int]] | None:
    """Put each segment, longest first, on the emptiest pack; None if one does not fit there.

    With at least `num_packs` segments of at most `capacity` tokens, no pack stays empty.
    """
    loads = [0] * num_packs
    members: list[list[int]] = [[] for _ in range(num_packs)]
    for i in longest_order(lengths):
        target = min(range(num_packs), key=lambda pack: (loads[pack], pack))
        if loads[target] + lengths[i] > capacity:
            return None
        loads[target] += lengths[i]
        members[target].append(i)
    return members


def _one_by_one(lengths: list[int], capacity: int, num_packs: int) -> list[list[int]] | None:
    """Fill each pack as well as possible around the longest segment
    left (minimum bin slack, Gupta and Ho 1999)."""
    left = longest_order(lengths)
    members: list[list[int]] = []
    for _ in range(num_packs):
        chosen = [left[i] for i in select_pack([lengths[i] for i in left], capacity)]
        members.append(chosen)
        taken = set(chosen)
        left = [i for i in left if i not in taken]
    return None if left else members


def _exchange(lengths: list[int], capacity: int, num_packs: int) -> list[list[int]] | None:
    if len(lengths) <= SURE_SEGMENTS:
        return None
    start = longest_first(lengths, sum(lengths), num_packs)
    assert start is not None, "nothing is too long for a pack of all tokens"
    return repair_by_exchange(lengths, capacity, start, MAX_EXCHANGE_WORK)


def _search(lengths: list[int], capacity: int, num_packs: int, max_work: int) -> list[list[int]]:
    order = longest_order(lengths)
    where = f"window of {len(lengths)} segments for {num_packs} packs of {capacity} tokens"
    try:
        fillings = complete_bins([lengths[i] for i in order], capacity, num_packs, max_work)
    except WorkExhausted as exc:
        raise WindowSearchExhausted(
            f"{where}: the search took {max_work} steps without an answer, so the window may or "
            "may not be feasible; leave more room (raise training.global_max_length or lower "
            "training.effective_batch_size), or use post_rollout_pack_scope: micro"
        ) from exc
    if fillings is None:
        raise InfeasibleWindow(
            "indivisible",
            f"{where}: got {sum(lengths)} tokens, which would fit into {num_packs * capacity}, but "
            f"no division of whole segments does (longest {max(lengths)}); {OVERSIZED_ADVICE}; "
            "or lower training.effective_batch_size, or use post_rollout_pack_scope: micro",
        )
    members = [[order[position] for position in filling] for filling in fillings]
    return members + [[] for _ in range(num_packs - len(members))]


def _fill_empty(members: list[list[int]], lengths: list[int]) -> None:
    """Give every empty pack the shortest segment of the fullest pack that can spare one."""
    for empty in [pack for pack in members if not pack]:
        donor = max(
            (pack for pack in members if len(pack) > 1), key=lambda p: (sum(lengths[i] for i in p), -p[0])
        )
        shortest = min(donor, key=lambda i: (lengths[i], i))
        donor.remove(shortest)
        empty.append(shortest)


def _even_out(members: list[list[int]], lengths: list[int]) -> None:
    """Move or exchange single segments between the fullest and the
    emptiest pack while that narrows their gap.

    The sum of squared loads falls with every change, so this ends;
    the number of rounds is bounded all the same.
    """
    for _ in range(4 * len(lengths)):
        loads = [sum(lengths[i] for i in pack) for pack in members]
        full = max(range(len(members)), key=lambda p: (loads[p], -p))
        lean = min(range(len(members)), key=lambda p: (loads[p], p))
        gap = loads[full] - loads[lean]
        options: list[tuple[int, int, int | None]] = []
        for give in members[full]:
            for take in [None, *members[lean]]:
                moved = lengths[give] - (0 if take is None else lengths[take])
                is_kept_filled = take is not None or len(members[full]) > 1
                if 0 < moved < gap and is_kept_filled:
                    options.append((abs(gap - 2 * moved), give, take))
        if not options:
            return
        _, give, take = min(
            options, key=lambda option: (option[0], option[1], -1 if option[2] is None else option[2])
        )
        members[full].remove(give)
        members[lean].append(give)
        if take is not None:
            members[lean].remove(take)
            members[full].append(take)
