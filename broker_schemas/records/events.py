"""The log as values: one event a transition, read from the stream or from the archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class PushedRow(NamedTuple):
    """One rollout of a `pushed` event; lengths in tokens, times in ms of the producer's clock."""

    record_id: str
    policy_version: int
    request_id: str
    num_tokens: int
    task: str
    sample_id: str
    generated_at_ms: int
    purpose: str
    optimizer_step: int


class MatchedRow(NamedTuple):
    """One segment of a `matched` event; its length in tokens."""

    record_id: str
    encoded_length: int


class RejectedRow(NamedTuple):
    """One record of a `rejected` or `quarantined` event."""

    record_id: str
    reason: str


class ClaimedPack(NamedTuple):
    """One pack of a `claimed` event, with the lowest version and the ids of its segments in order."""

    rank: int
    pack_id: str
    policy_version: int
    record_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LogEvent:
    """One entry of the log. ``event_id`` is ``<server ms>-<n>``; ``fields`` are text but for ``summary``."""

    event_id: str
    kind: str
    fields: Mapping[str, bytes]

    @property
    def at_ms(self) -> int:
        """When it happened, ms of the server's clock."""
        return int(self.event_id.partition("-")[0])

    def text(self, name: str) -> str:
        return self.fields.get(name, b"").decode("utf-8", "replace")

    def number(self, name: str) -> int:
        return int(self.fields[name])

    def ids(self, name: str = "ids") -> list[str]:
        return self.text(name).split()

    def pushed_rows(self) -> list[PushedRow]:
        """Return the rollouts of a `pushed` event."""
        return [
            PushedRow(name, int(version), request, int(tokens), task, sample, int(at_ms), purpose, int(step))
            for name, version, request, tokens, task, sample, at_ms, purpose, step in self._rows("records")
        ]

    def matched_rows(self) -> list[MatchedRow]:
        """Return the segments of a `matched` event."""
        return [MatchedRow(name, int(length)) for name, length in self._rows("records")]

    def rejected_rows(self) -> list[RejectedRow]:
        """Return the records of a `rejected` or `quarantined` event."""
        return [RejectedRow(name, reason) for name, reason in self._rows("records")]

    def claimed_packs(self) -> list[ClaimedPack]:
        """Return the packs of a `claimed` event, by rank in micro-step order; none for an A step."""
        return [
            ClaimedPack(int(rank), pack_id, int(version), tuple(ids.split()))
            for rank, pack_id, version, ids in self._rows("packs")
        ]

    def _rows(self, name: str) -> list[list[str]]:
        return [line.split("\t") for line in self.text(name).split("\n") if line]


def event_from_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> LogEvent:
    """Return a stream entry as an event."""
    named = {name.decode(): value for name, value in fields.items()}
    kind = named.pop("type", b"").decode()
    return LogEvent(event_id=entry_id.decode(), kind=kind, fields=named)
