"""Holds matched segments in insertion order and decides when a pack may leave.

Owns waiting and carrying over; it must not know the broker, the clock or ranks.
Which segments go together is `consumers.packing`'s choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from broker_schemas.records.packs import MatchedDescriptor, ReadyPack
from consumers.packing import (
    OversizedSegment,
    PackingError,
    SelectionMethod,
    oversized_message,
    require_method,
    select_pack,
)

FILL_TO_GIVE_UP: Final = 0.05
"""Most of the fullest pack's fill that is given up, where none could be filled, to keep versions apart."""

Urgency = Literal["patient", "hungry", "forced"]
EmitReason = Literal["filled", "lookahead", "buffer_full", "hungry", "forced"]


class PackBufferFull(PackingError):
    """The buffer already holds `packing_buffer` segments; it was not changed."""


@dataclass(frozen=True, kw_only=True)
class PackBufferSettings:
    """Limits and thresholds of one buffer; checked on creation."""

    capacity_tokens: int
    """Tokens in one pack (`training.global_max_length`)."""
    packing_buffer: int
    """Most segments held at once (`training.packing_buffer`)."""
    min_fill_ratio: float
    """A pack below this share of the capacity is reported as underfilled
    (`training.packing_min_fill_ratio`)."""
    method: SelectionMethod
    """How the segments of a pack are selected (`training.packing_selector`)."""
    target_fill_ratio: float = 0.98
    """A pack from this share of the capacity on leaves at once: waiting could not better it by much."""
    lookahead_packs: int = 4
    """With this many packs' worth of tokens waiting, more choice brings nothing and the best pack leaves."""

    def __post_init__(self) -> None:
        require_method(self.method)
        for name in ("capacity_tokens", "packing_buffer", "lookahead_packs"):
            if getattr(self, name) < 1:
                raise PackingError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.min_fill_ratio <= self.target_fill_ratio <= 1.0:
            raise PackingError(
                f"fill ratios: got min_fill_ratio {self.min_fill_ratio} and target_fill_ratio "
                f"{self.target_fill_ratio}, expected 0 <= min <= target <= 1"
            )


@dataclass(frozen=True, kw_only=True)
class PackChoice:
    """One pack that leaves the buffer, with what its metrics need."""

    segments: tuple[MatchedDescriptor, ...]
    pack: ReadyPack
    reason: EmitReason
    num_left_segments: int


class PackBuffer:
    """Segments in insertion order; leftovers of a pack stay for the next one, and nothing is ever flushed."""

    def __init__(self, settings: PackBufferSettings) -> None:
        self._settings = settings
        self._segments: list[MatchedDescriptor] = []
        self._ids: set[str] = set()
        self._buffered_tokens = 0

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def segments(self) -> tuple[MatchedDescriptor, ...]:
        """What is held, oldest first."""
        return tuple(self._segments)

    @property
    def num_free_places(self) -> int:
        """How many segments may still be inserted; never negative."""
        return max(0, self._settings.packing_buffer - len(self._segments))

    def insert(self, segment: MatchedDescriptor) -> bool:
        """Add the youngest segment; False if its id is held already (a redelivery).

        Raises `OversizedSegment` (no pack could ever hold it), `PackBufferFull`, and `PackingError` for a
        length below 1. The buffer is unchanged whenever this raises or returns False.
        """
        capacity = self._settings.capacity_tokens
        if segment.record_id in self._ids:
            return False
        if segment.encoded_length < 1:
            raise PackingError(
                f"segment {segment.record_id}: got {segment.encoded_length} tokens, expected at least 1"
            )
        if segment.encoded_length > capacity:
            raise OversizedSegment(oversized_message(segment.record_id, segment.encoded_length, capacity))
        if not self.num_free_places:
            raise PackBufferFull(
                f"segment {segment.record_id}: the pack buffer holds {len(self)} segments, "
                f"expected fewer than {self._settings.packing_buffer}; "
                "take packs out first, read fewer segments at a time, "
                "or raise training.packing_buffer"
            )
        self._hold([*self._segments, segment])
        return True

    def next_pack(self, urgency: Urgency = "patient") -> PackChoice | None:
        """Take the next pack out, or None while waiting is better; None whenever the buffer is empty.

        The candidate always holds the segment that is stale soonest: of the lowest policy version the oldest.
        A pack is as old as its oldest segment, so younger versions join only where those below do not make
        a pack that may leave [P-13]; within a range of versions the choice is `select_pack`'s. It leaves when
        it reaches `target_fill_ratio` (`filled`); or `lookahead_packs` packs' worth of tokens wait
        (`lookahead`); or no further segment could be inserted (`buffer_full`); or the caller is `hungry` (a
        learner rank has fewer packs ready than its next step needs) and it reaches `min_fill_ratio`; or the
        caller is `forced` (nothing more will arrive for this step, or its patience has run out), whatever the
        fill.
        """
        if not self._segments or not self._may_emit(urgency):
            return None
        settings = self._settings
        found = self._choose(urgency)
        if found is None:
            return None
        chosen, reason = found
        taken = set(chosen)
        members = tuple(self._segments[i] for i in sorted(chosen))
        self._hold([segment for i, segment in enumerate(self._segments) if i not in taken])
        return PackChoice(
            segments=members,
            pack=ReadyPack.of(members, capacity=settings.capacity_tokens),
            reason=reason,
            num_left_segments=len(self._segments),
        )

    def put_back(self, segments: Iterable[MatchedDescriptor]) -> None:
        """Return segments of a pack that was not committed; they go to the front, in the given order.

        They were admitted before, so this may exceed
        `packing_buffer`; ids that are held already are left out.
        """
        returned = {segment.record_id: segment for segment in segments if segment.record_id not in self._ids}
        self._hold([*returned.values(), *self._segments])

    def discard(self, is_unwanted: Callable[[MatchedDescriptor], bool]) -> list[MatchedDescriptor]:
        """Remove the segments for which the predicate holds (stale ones) and return them, oldest first."""
        removed = [segment for segment in self._segments if is_unwanted(segment)]
        gone = {segment.record_id for segment in removed}
        self._hold([segment for segment in self._segments if segment.record_id not in gone])
        return removed

    def _choose(self, urgency: Urgency) -> tuple[list[int], EmitReason] | None:
        """Return the places of the pack that leaves now and why, None where none may."""
        versions = sorted({segment.policy_version for segment in self._segments})
        candidates = []
        for newest in versions:
            chosen, fill_ratio = self._select(newest)
            reason = self._emit_reason(fill_ratio, urgency)
            is_enough = fill_ratio >= self._settings.min_fill_ratio
            if reason == "filled" or (is_enough and reason in ("hungry", "forced")):
                return chosen, reason
            candidates.append((chosen, fill_ratio, reason))
        _, best_fill, reason = candidates[-1]
        if reason is None:
            return None
        enough = best_fill * (1 - FILL_TO_GIVE_UP)
        return next(chosen for chosen, fill_ratio, _ in candidates if fill_ratio >= enough), reason

    def _select(self, newest_version: int) -> tuple[list[int], float]:
        """Return the best pack of versions up to ``newest_version``, as places, and its fill."""
        settings = self._settings
        places = [i for i, segment in enumerate(self._segments) if segment.policy_version <= newest_version]
        places.sort(key=lambda i: (self._segments[i].policy_version, i))
        lengths = [self._segments[i].encoded_length for i in places]
        chosen = select_pack(lengths, settings.capacity_tokens, settings.method)
        fill_ratio = sum(lengths[i] for i in chosen) / settings.capacity_tokens
        return [places[i] for i in chosen], fill_ratio

    def _may_emit(self, urgency: Urgency) -> bool:
        """Spare the selection where even all segments together would not do."""
        threshold = {
            "patient": self._settings.target_fill_ratio,
            "hungry": self._settings.min_fill_ratio,
            "forced": 0.0,
        }[urgency]
        enough_tokens = self._buffered_tokens / self._settings.capacity_tokens >= threshold
        return enough_tokens or not self.num_free_places

    def _emit_reason(self, fill_ratio: float, urgency: Urgency) -> EmitReason | None:
        settings = self._settings
        if fill_ratio >= settings.target_fill_ratio:
            return "filled"
        if self._buffered_tokens >= settings.lookahead_packs * settings.capacity_tokens:
            return "lookahead"
        if not self.num_free_places:
            return "buffer_full"
        if urgency == "hungry" and fill_ratio >= settings.min_fill_ratio:
            return "hungry"
        return "forced" if urgency == "forced" else None

    def _hold(self, segments: list[MatchedDescriptor]) -> None:
        self._segments = segments
        self._ids = {segment.record_id for segment in segments}
        self._buffered_tokens = sum(segment.encoded_length for segment in segments)
