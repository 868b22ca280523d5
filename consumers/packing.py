"""Picks the segments of one pack from their encoded lengths.

Owns the choice alone: it knows lengths and positions, and must not
know records, versions, ranks or the broker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from operator import index as exact_int
from typing import Literal, cast

SelectionMethod = Literal["exact", "binpacking", "fifo"]
SELECTION_METHODS: tuple[SelectionMethod, ...] = ("exact", "binpacking", "fifo")

OVERSIZED_ADVICE = (
    "raise training.global_max_length, or make segments shorter: lower "
    "custom.extra.rollout_matching.max_new_tokens, lower the image bounds, or take images with fewer objects"
)


class PackingError(ValueError):
    """Input that cannot be packed; nothing was changed or dropped."""


class OversizedSegment(PackingError):
    """A segment longer than the pack capacity; segments are atomic, so no pack can hold it."""


class BinpackingMissing(PackingError):
    """The `binpacking` method was asked for and the library is not installed."""


def select_pack(lengths: Sequence[int], capacity: int, method: SelectionMethod = "exact") -> list[int]:
    """Pick the segments of one pack: always the oldest, never more than the capacity.

    `lengths` are encoded lengths in tokens, in insertion order (index 0 is the oldest). Returns ascending
    indices; no lengths give an empty list. `fifo` goes through the segments in order and takes each one that
    still fits. `binpacking` and `exact` replace the FIFO pack only by one with a strictly larger total, and
    among their own candidates of equal total take the lexicographically smallest index list, so that older
    segments go first. The exact total is the largest sum of a subset that contains the oldest and fits.
    Raises `OversizedSegment` for a length over the capacity, `BinpackingMissing`, and `PackingError` for
    anything that is not a positive whole number.
    """
    checked = check_lengths(lengths, capacity)
    require_method(method)
    if not checked:
        return []
    fifo = _fifo(checked, capacity)
    fifo_total = sum(checked[i] for i in fifo)
    if method == "fifo" or fifo_total == capacity:
        return fifo
    candidate = _exact(checked, capacity) if method == "exact" else _binpacking(checked, capacity)
    return candidate if sum(checked[i] for i in candidate) > fifo_total else fifo


def require_method(method: str) -> None:
    """Fail where a selection method is unknown or cannot run here; a packer calls it before it starts."""
    if method not in SELECTION_METHODS:
        raise PackingError(
            f"unknown selection method: got {method!r}, expected one of {', '.join(SELECTION_METHODS)}"
        )
    if method == "binpacking":
        _volume_packer()


def check_lengths(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the lengths as plain ints, or say which one cannot be packed into `capacity` tokens."""
    try:
        checked = [exact_int(length) for length in lengths]
        capacity = exact_int(capacity)
    except TypeError as exc:
        raise PackingError(f"lengths and capacity are whole numbers of tokens: {exc}") from exc
    if capacity < 1:
        raise PackingError(
            f"pack capacity: got {capacity} tokens, expected at least 1; set training.global_max_length"
        )
    for position, length in enumerate(checked):
        if length < 1:
            raise PackingError(f"segment at index {position}: got {length} tokens, expected at least 1")
        if length > capacity:
            raise OversizedSegment(oversized_message(f"at index {position}", length, capacity))
    return checked


def oversized_message(which: str, length_tokens: int, capacity: int) -> str:
    """Say that a segment is too long for any pack, and what to change."""
    return (
        f"segment {which}: got {length_tokens} tokens, expected at most the pack capacity of {capacity}; "
        f"a segment is never cut: {OVERSIZED_ADVICE}"
    )


def _fifo(lengths: list[int], capacity: int) -> list[int]:
    selected = []
    room = capacity
    for position, length in enumerate(lengths):
        if length <= room:
            selected.append(position)
            room -= length
    return selected


def _exact(lengths: list[int], capacity: int) -> list[int]:
    """Subset sums as bits of an integer: bit t of `reach[i]` is set iff segments after i can add up to t."""
    room = capacity - lengths[0]
    mask = (1 << (room + 1)) - 1
    bits = 1
    reach = [bits]
    for length in reversed(lengths[1:]):
        if length <= room:
            bits |= (bits << length) & mask
        reach.append(bits)
    reach.reverse()
    remaining = bits.bit_length() - 1
    selected = [0]
    for position in range(1, len(lengths)):
        if not remaining:
            break
        left_after = remaining - lengths[position]
        if left_after >= 0 and (reach[position] >> left_after) & 1:
            selected.append(position)
            remaining = left_after
    return selected


def _binpacking(lengths: list[int], capacity: int) -> list[int]:
    room = capacity - lengths[0]
    others = {i: length for i, length in enumerate(lengths) if i > 0 and length <= room}
    if not others:
        return [0]
    bins = _volume_packer()(others, room)
    candidates = [[0, *sorted(members)] for members in bins]
    return min(candidates, key=lambda chosen: (-sum(lengths[i] for i in chosen), chosen))


def _volume_packer() -> Callable[[Mapping[int, int], int], list[dict[int, int]]]:
    # Imported at call time: the other methods must work where the library is not installed.
    try:
        library = importlib.import_module("binpacking")
    except ImportError as exc:
        raise BinpackingMissing(
            "selection method 'binpacking' needs the library binpacking, which is not installed; "
            "install it with `pip install binpacking`, or choose the method 'exact' (the default) or 'fifo'"
        ) from exc
    return cast(Callable[[Mapping[int, int], int], list[dict[int, int]]], library.to_constant_volume)
