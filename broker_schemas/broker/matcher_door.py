"""What a matcher asks of the broker: rollouts to match, and the commit of what became of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.group_reader import IDLE_MS, GroupReader, Row
from broker_schemas.broker.keys import MATCHER_GROUP
from broker_schemas.errors import BrokerFull, BrokerUnavailable
from broker_schemas.records.records import NOT_STEP_BOUND, MatchedSegment

BROUGHT_KEPT_S: Final = 120
TRIES_KEPT_S: Final = 7 * 24 * 3600
BODY_APART_SINCE: Final = 2
"""The schema version of an entry from which on its body lies beside the stream."""


@dataclass(frozen=True, kw_only=True)
class RawEntry:
    """A stream entry as it was found: nothing in it is trusted yet.

    ``body`` is None where the broker no longer has it; ``num_bytes`` is what was counted for it.
    ``line`` is what the log says of it, empty for entries written before they had one.
    """

    entry_id: bytes
    record_id: str
    kind: str
    schema_version: int
    policy_version: int
    body: bytes | None
    num_bytes: int
    line: str = ""


@dataclass(frozen=True, kw_only=True)
class MatchVerdict:
    """What becomes of one rollout. ``reason`` is one word, ``detail`` one line; payloads as outcome needs."""

    entry: RawEntry
    outcome: Literal["matched", "evaluated", "dropped", "rejected"]
    reason: str = ""
    detail: str = ""
    segment: MatchedSegment | None = None
    result_body: bytes = b""


class MatcherDoor:
    """One matcher's side of the broker; ``consumer`` is its stable name. All methods raise BrokerError."""

    def __init__(self, broker: Broker, consumer: str, *, idle_ms: int = IDLE_MS) -> None:
        self.broker = broker
        self._reader = GroupReader(broker, "segments", MATCHER_GROUP, consumer, idle_ms)
        self.look_again = self._reader.look_again
        self.is_due = self._reader.is_due

    def read(self, *, count: int, block_ms: int | None) -> list[RawEntry]:
        """Return up to ``count`` new rollouts, waiting up to ``block_ms`` for the first (None: not at all);
        may be empty.
        """
        return self._with_bodies(self._reader.read(count=count, block_ms=block_ms))

    def found_again(self, now_s: float, *, count: int, held: Container[bytes] = ()) -> list[RawEntry]:
        """Return rollouts that are pending and in nobody's hands: see ``GroupReader.found_again``.

        Whatever this matcher was given and has not committed is among them, but for ``held`` (entry ids):
        ask between batches only.
        """
        return self._with_bodies(self._reader.found_again(now_s, count=count, held=held))

    def note_try(self, entry: RawEntry) -> int:
        """Note that ``entry`` is now judged alone; return how often it was, this time included.

        A server at its memory limit takes no note: it counts as the first time, for judging frees memory.
        """
        key = self.broker.keys.named("tries")
        try:
            with broker_errors("noting a try"):
                pipe = self.broker.client.pipeline(transaction=False)
                pipe.hincrby(key, entry.entry_id.decode(), 1)
                pipe.expire(key, TRIES_KEPT_S)
                return int(pipe.execute()[0])
        except BrokerFull:
            return 1

    def forget_tries(self, entry: RawEntry) -> None:
        """Forget the tries of an entry that was judged."""
        with broker_errors("forgetting tries"):
            self.broker.client.hdel(self.broker.keys.named("tries"), entry.entry_id.decode())

    def _with_bodies(self, rows: Sequence[Row]) -> list[RawEntry]:
        """Return rows of the stream as entries, with the bodies that lie beside it."""
        entries = [read_entry(entry_id, fields) for entry_id, fields in rows if fields]
        apart = [entry for entry in entries if entry.body is None]
        if not apart:
            return entries
        with broker_errors("fetching rollouts"):
            bodies: Any = self.broker.client.mget([self.broker.keys.body(entry.record_id) for entry in apart])
        found = {entry.entry_id: body for entry, body in zip(apart, bodies, strict=True)}
        return [replace(entry, body=found.get(entry.entry_id, entry.body)) for entry in entries]

    def commit(self, verdicts: Sequence[MatchVerdict], *, oldest_policy_version: int) -> list[str]:
        """Commit verdicts in one transition; return a status for each (``gone``: someone else was faster)."""
        return self.prepare_commit(verdicts, oldest_policy_version=oldest_policy_version)()

    def prepare_commit(
        self, verdicts: Sequence[MatchVerdict], *, oldest_policy_version: int
    ) -> Callable[[], list[str]]:
        """Encode a commit; what is returned sends it, in any thread, and returns what ``commit`` does."""
        arguments: list[str | int | bytes] = [MATCHER_GROUP, oldest_policy_version, len(verdicts)]
        bodies: dict[str, bytes] = {}
        for verdict in verdicts:
            arguments += _verdict_arguments(verdict)
            if verdict.segment is not None and verdict.outcome == "matched":
                bodies[verdict.entry.record_id] = verdict.segment.encode_body()
        return partial(self._send_commit, arguments, bodies) if verdicts else list

    def _send_commit(self, arguments: Sequence[str | int | bytes], bodies: Mapping[str, bytes]) -> list[str]:
        named_keys = ["segments", "matched", "rejected", "evaluations"]
        made = [(self.broker.keys.made(name), body) for name, body in bodies.items()]
        try:
            reply = self.broker.run("commit_match", named_keys, arguments, bodies=made)
        except BrokerFull:
            if not made:
                raise
            flat = [part for pair in bodies.items() for part in pair]
            self.broker.run("bring_segments", [], [BROUGHT_KEPT_S, len(bodies), *flat])
            reply = self.broker.run("commit_match", named_keys, arguments)
        statuses: list[str] = reply.decode().split()
        if "no_body" in statuses:
            raise BrokerUnavailable(
                f"committing {len(statuses)} rollouts: {statuses.count('no_body')} segments were gone before "
                "they were taken; their rollouts are still pending"
            )
        return statuses


def _verdict_arguments(verdict: MatchVerdict) -> list[str | bytes]:
    entry, text, extra, step = verdict.entry, verdict.reason, b"", NOT_STEP_BOUND
    if verdict.outcome == "matched":
        assert verdict.segment is not None, "a matched verdict carries its segment"
        text, step = str(verdict.segment.encoded_length), verdict.segment.optimizer_step
    elif verdict.outcome == "evaluated":
        extra = verdict.result_body
    elif verdict.outcome == "rejected":
        extra = " ".join(verdict.detail.split())[:500].encode()
    record_id = entry.record_id.replace("\t", " ")
    line = (
        f"{entry.entry_id.decode()}\t{record_id}\t{verdict.outcome}\t{entry.policy_version}"
        f"\t{entry.num_bytes}\t{step}\t{text}"
    )
    return [line, extra]


def read_entry(entry_id: bytes, fields: dict[bytes, bytes]) -> RawEntry:
    """Return a stream entry with hostile or missing fields made harmless: they fail later, by name.

    Its body is None where it lies beside the stream.
    """
    body = fields.get(b"body", None if _number(fields.get(b"schema_version")) >= BODY_APART_SINCE else b"")
    return RawEntry(
        entry_id=entry_id,
        record_id=fields.get(b"record_id", b"?").decode("utf-8", "replace")[:200] or "?",
        kind=fields.get(b"kind", b"").decode("utf-8", "replace"),
        schema_version=_number(fields.get(b"schema_version")),
        policy_version=_number(fields.get(b"policy_version")),
        body=body,
        num_bytes=_number(fields.get(b"bytes")) if body is None else len(body),
        line=fields.get(b"line", b"").decode("utf-8", "replace"),
    )


def _number(raw: bytes | None) -> int:
    return int(raw) if raw is not None and raw.isdigit() and len(raw) < 19 else 0
