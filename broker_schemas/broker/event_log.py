"""Reads the log that a broker holds: from a place on, or as it grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.records.events import LogEvent, event_from_entry

READ_BATCH = 1000


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
