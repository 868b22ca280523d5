"""Descriptors, packs and claims: what says *which* segments train together, without their payload."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

from broker_schemas.errors import SchemaTooNew
from broker_schemas.records import codec
from broker_schemas.records.body_fields import BodyReader
from broker_schemas.records.reasons import QuarantineReason
from broker_schemas.records.records import NOT_STEP_BOUND, Channel

_INTEGER: Final = re.compile(rb"-?[0-9]{1,18}")
ClaimReason = Literal[
    "schedule",  # A, because the schedule says so
    "claimed",  # B, with exactly its packs
    "queue_short",  # A although B was scheduled: not every rank had its fresh packs
]


@dataclass(frozen=True, kw_only=True)
class MatchedDescriptor:
    """What the packer sees of a matched segment: no tokens, only what it compares.

    An entry of ``matched``: its fields in version 2, a msgpack body (with some fields more) in version 1.
    """

    SCHEMA_VERSION: ClassVar[int] = 2

    record_id: str
    policy_version: int
    encoded_length: int
    optimizer_step: int = NOT_STEP_BOUND

    @classmethod
    def from_entry(cls, fields: Mapping[bytes, bytes]) -> MatchedDescriptor:
        """Return what an entry of any version says; raises a RecordError."""
        if b"body" in fields:
            return cls.decode_body(fields[b"body"])
        named = {name.decode("utf-8", "replace"): value for name, value in fields.items()}
        numbers = {name: int(value) for name, value in named.items() if _INTEGER.fullmatch(value)}
        record_id = named.get("record_id", b"").decode("utf-8", "replace")
        version = numbers.get("schema_version", 0)
        if version > cls.SCHEMA_VERSION:
            raise SchemaTooNew(f"descriptor: got schema_version {version}, expected {cls.SCHEMA_VERSION}")
        return cls._read({**numbers, "record_id": record_id})

    @classmethod
    def decode_body(cls, raw: bytes) -> MatchedDescriptor:
        """Return what the body of a version 1 entry says; raises a RecordError."""
        return cls._read(codec.decode_map(raw))

    @classmethod
    def _read(cls, body: Mapping[str, Any]) -> MatchedDescriptor:
        read = BodyReader(body, "matched descriptor")
        return cls(
            record_id=read.text("record_id"),
            policy_version=read.integer("policy_version", low=0),
            encoded_length=read.integer("encoded_length", low=1),
            optimizer_step=read.integer("optimizer_step", low=NOT_STEP_BOUND, default=NOT_STEP_BOUND),
        )


@dataclass(frozen=True, kw_only=True)
class ReadyPack:
    """One pack: its segments in insertion order and their encoded lengths (tokens).

    ``policy_version`` is the lowest of its segments [Q-5]; ``fill`` = tokens / capacity.
    """

    pack_id: str
    record_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    policy_version: int
    fill: float

    @classmethod
    def of(cls, members: Sequence[MatchedDescriptor], *, capacity: int) -> ReadyPack:
        """Return the pack of ``members`` in the given order (at least one); ``capacity`` in tokens."""
        lengths = tuple(member.encoded_length for member in members)
        return cls(
            pack_id=f"p.{members[0].record_id}",
            record_ids=tuple(member.record_id for member in members),
            lengths=lengths,
            policy_version=min(member.policy_version for member in members),
            fill=sum(lengths) / capacity,
        )

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    def without(self, record_ids: Collection[str]) -> ReadyPack:
        """Return the pack without some of its segments; it may be left with none."""
        staying = [place for place, name in enumerate(self.record_ids) if name not in record_ids]
        if len(staying) == len(self.record_ids):
            return self
        lengths = tuple(self.lengths[place] for place in staying)
        return replace(
            self,
            record_ids=without(self.record_ids, record_ids),
            lengths=lengths,
            fill=self.fill * sum(lengths) / self.total_tokens,
        )

    def to_body(self) -> dict[str, Any]:
        return {
            "pack_id": self.pack_id,
            "segment_ids": list(self.record_ids),
            "lengths": list(self.lengths),
            "policy_version": self.policy_version,
            "fill": self.fill,
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str = "pack") -> ReadyPack:
        return cls(
            pack_id=BodyReader(body, where).text("pack_id"),
            record_ids=tuple(str(item) for item in body["segment_ids"]),
            lengths=tuple(BodyReader(body, where).int_list("lengths", low=1, high=1 << 31)),
            policy_version=BodyReader(body, where).integer("policy_version", low=0),
            fill=float(body["fill"]),
        )


@dataclass(frozen=True, kw_only=True)
class StepClaim:
    """The decision of rank 0 for one optimizer step: what every rank trains, the same however often asked.

    ``packs[rank]`` are that rank's packs in micro-step order; empty for an A step.
    ``num_segments`` counts the segments of the step over all ranks: the denominator of its loss.
    ``policy_version`` is the current version when it was decided; ``short_ranks`` says which ranks kept a
    scheduled B step from happening.
    """

    optimizer_step: int
    kind: Channel
    reason: ClaimReason
    policy_version: int
    packs: tuple[tuple[ReadyPack, ...], ...] = ()
    short_ranks: tuple[int, ...] = ()

    @property
    def num_segments(self) -> int:
        return sum(len(pack.record_ids) for packs in self.packs for pack in packs)

    @property
    def record_ids(self) -> tuple[str, ...]:
        return tuple(name for packs in self.packs for pack in packs for name in pack.record_ids)

    def without(self, record_ids: Collection[str]) -> StepClaim:
        """Return the claim as it stands once segments were taken out of it."""
        return replace(
            self, packs=tuple(tuple(pack.without(record_ids) for pack in packs) for packs in self.packs)
        )

    def to_body(self) -> dict[str, Any]:
        return {
            "optimizer_step": self.optimizer_step,
            "kind": self.kind,
            "reason": self.reason,
            "policy_version": self.policy_version,
            "packs": [[pack.to_body() for pack in packs] for packs in self.packs],
            "short_ranks": list(self.short_ranks),
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> StepClaim:
        read = BodyReader(body, "claim")
        return cls(
            optimizer_step=read.integer("optimizer_step", low=0),
            kind=read.choice("kind", ("A", "B")),
            reason=read.choice("reason", ("schedule", "claimed", "queue_short")),
            policy_version=read.integer("policy_version", low=0),
            packs=tuple(tuple(ReadyPack.from_body(pack) for pack in packs) for packs in body["packs"]),
            short_ranks=tuple(read.int_list("short_ranks", low=0, high=1 << 20)),
        )


@dataclass(frozen=True, kw_only=True)
class Untrainable:
    """A claimed segment that cannot be trained, and why."""

    record_id: str
    reason: QuarantineReason
    detail: str


def without(record_ids: Sequence[str], gone: Collection[str]) -> tuple[str, ...]:
    """Return ``record_ids`` but for those that are ``gone``, in their order."""
    return tuple(name for name in record_ids if name not in gone)
