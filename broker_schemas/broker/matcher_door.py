"""What a matcher asks of the broker: rollouts to match, and the commit of what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.keys import MATCHER_GROUP
from broker_schemas.records.packs import MatchedDescriptor
from broker_schemas.records.records import MatchedSegment


@dataclass(frozen=True, kw_only=True)
class RawEntry:
    """A stream entry as it was found: nothing in it is trusted yet."""

    entry_id: bytes
    record_id: str
    kind: str
    schema_version: int
    policy_version: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class MatchVerdict:
    """What becomes of one rollout. ``text`` is the reason, ``detail`` one line; payloads as outcome needs."""

    entry: RawEntry
    outcome: Literal["matched", "evaluated", "dropped", "rejected"]
    reason: str = ""
    detail: str = ""
    segment: MatchedSegment | None = None
    result_body: bytes = b""


@dataclass
class MatcherDoor:
    """One matcher's side of the broker; ``consumer`` is its stable name. All methods raise BrokerError."""

    broker: Broker
    consumer: str
    idle_ms: int = 15_000
    _autoclaim_from: bytes = field(default=b"0-0", init=False)

    def read(self, *, count: int, block_ms: int) -> list[RawEntry]:
        """Return up to ``count`` new rollouts, waiting up to ``block_ms`` for the first; may be empty."""
        stream = self.broker.keys.named("segments")
        with broker_errors("reading rollouts"):
            reply = self.broker.client.xreadgroup(
                MATCHER_GROUP, self.consumer, {stream: ">"}, count=count, block=block_ms
            )
        return entries_of(reply)

    def read_own_pending(self, *, count: int) -> list[RawEntry]:
        """Return rollouts this consumer was given before and never committed (after a restart)."""
        stream = self.broker.keys.named("segments")
        with broker_errors("reading own pending rollouts"):
            reply = self.broker.client.xreadgroup(MATCHER_GROUP, self.consumer, {stream: "0"}, count=count)
        return entries_of(reply)

    def take_over_idle(self, *, count: int) -> list[RawEntry]:
        """Return rollouts that another consumer has held for longer than ``idle_ms``."""
        with broker_errors("taking over idle rollouts"):
            reply = self.broker.client.xautoclaim(
                self.broker.keys.named("segments"),
                MATCHER_GROUP,
                self.consumer,
                self.idle_ms,
                start_id=self._autoclaim_from,
                count=count,
            )
        self._autoclaim_from = reply[0]
        return [read_entry(entry_id, fields) for entry_id, fields in reply[1] if fields]

    def commit(self, verdicts: Sequence[MatchVerdict], *, oldest_policy_version: int) -> list[str]:
        """Commit verdicts in one transition; return a status for each (``gone``: someone else was faster)."""
        if not verdicts:
            return []
        arguments: list[str | int | bytes] = [MATCHER_GROUP, oldest_policy_version, len(verdicts)]
        for verdict in verdicts:
            arguments += _verdict_arguments(verdict)
        reply = self.broker.run("commit_match", ["segments", "matched", "rejected", "evaluations"], arguments)
        statuses: list[str] = reply.decode().split()
        return statuses


def _verdict_arguments(verdict: MatchVerdict) -> list[str | int | bytes]:
    entry = verdict.entry
    text, first, second = verdict.reason, b"", b""
    if verdict.outcome == "matched":
        segment = verdict.segment
        assert segment is not None, "a matched verdict carries its segment"
        text = str(segment.encoded_length)
        first, second = describe(segment).encode_body(), segment.encode_body()
    elif verdict.outcome == "evaluated":
        first = verdict.result_body
    elif verdict.outcome == "rejected":
        first, second = " ".join(verdict.detail.split())[:500].encode(), entry.body
    record_id = entry.record_id.replace("\t", " ")
    line = (
        f"{entry.entry_id.decode()}\t{record_id}\t{verdict.outcome}\t{entry.policy_version}"
        f"\t{len(entry.body)}\t{text}"
    )
    return [line, first, second]


def describe(segment: MatchedSegment) -> MatchedDescriptor:
    """Return what the packer may know of a segment."""
    return MatchedDescriptor(
        record_id=segment.record_id,
        policy_version=segment.policy_version,
        encoded_length=segment.encoded_length,
        sample_id=segment.sample_id,
        task=segment.task,
        generated_at_ms=segment.generated_at_ms,
        optimizer_step=segment.optimizer_step,
    )


def read_entry(entry_id: bytes, fields: dict[bytes, bytes]) -> RawEntry:
    """Return a stream entry with hostile or missing fields made harmless: they fail later, by name."""
    return RawEntry(
        entry_id=entry_id,
        record_id=fields.get(b"record_id", b"?").decode("utf-8", "replace")[:200] or "?",
        kind=fields.get(b"kind", b"").decode("utf-8", "replace"),
        schema_version=_number(fields.get(b"schema_version")),
        policy_version=_number(fields.get(b"policy_version")),
        body=fields.get(b"body", b""),
    )


def _number(raw: bytes | None) -> int:
    return int(raw) if raw is not None and raw.isdigit() and len(raw) < 19 else 0


def entries_of(reply: Any) -> list[RawEntry]:
    """Return the entries of an XREADGROUP reply over one stream (RESP2 list or RESP3 map)."""
    if not reply:
        return []
    batches = reply.values() if isinstance(reply, dict) else [batch for _, batch in reply]
    found: list[RawEntry] = []
    for batch in batches:
        rows = batch[0] if batch and isinstance(batch[0], list) else batch
        found += [read_entry(entry_id, fields) for entry_id, fields in rows if fields]
    return found
