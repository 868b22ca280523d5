"""The log as values: one event a transition, read from the stream or from the archive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker_schemas.broker import Broker
from broker_schemas.connection import broker_errors

READ_BATCH = 1000


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

    def rows(self, name: str) -> list[list[str]]:
        """Return a field of lines as rows of columns; empty for an empty field."""
        return [line.split("\t") for line in self.text(name).split("\n") if line]


def event_from_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> LogEvent:
    """Return a stream entry as an event."""
    named = {name.decode(): value for name, value in fields.items()}
    kind = named.pop("type", b"").decode()
    return LogEvent(event_id=entry_id.decode(), kind=kind, fields=named)


def read_events(broker: Broker, after: str = "-") -> Iterator[LogEvent]:
    """Yield the events the broker still holds, oldest first, after event id ``after``; raises BrokerError."""
    stream = broker.keys.named("events")
    start = after if after == "-" else f"({after}"
    while True:
        with broker_errors("reading the log"):
            batch: Any = broker.client.xrange(stream, start, "+", count=READ_BATCH)
        for entry_id, fields in batch:
            yield event_from_entry(entry_id, fields)
        if len(batch) < READ_BATCH:
            return
        start = f"({batch[-1][0].decode()}"


def follow_events(broker: Broker, after: str, *, block_ms: int) -> list[LogEvent]:
    """Return events after ``after`` (``0-0``: from the start), waiting up to ``block_ms`` for the first."""
    stream = broker.keys.named("events")
    with broker_errors("following the log"):
        reply: Any = broker.client.xread({stream: after}, count=READ_BATCH, block=block_ms)
    if not reply:
        return []
    rows = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
    return [event_from_entry(entry_id, fields) for entry_id, fields in rows]
