"""One look at the broker for the exporter: the run's sums, its groups, the ages of what waits, the memory.

It reads. What a number means for a dashboard is told by `exporter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP
from broker_schemas.broker.status import RunStatus, read_status

STREAM_OF_GROUP: Final = {MATCHER_GROUP: "segments", PACKER_GROUP: "matched"}
ACTIVE_WITHIN_MS: Final = 60_000


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """A consumer group. ``lag_records``: not handed out yet; ``pending_records``: handed out, not settled.

    ``idle_ms``: since the last of its consumers asked for anything, None without any.
    """

    lag_records: int
    pending_records: int
    num_active: int
    idle_ms: int | None


@dataclass(frozen=True, kw_only=True)
class BrokerSnapshot:
    """What the broker says at one moment; ages are ms by the server's clock, 0 where nothing waits."""

    status: RunStatus
    stream_lengths: Mapping[str, int]
    groups: Mapping[str, GroupState]
    oldest_waiting_ms: Mapping[str, int]
    archive_behind_ms: int
    used_memory_bytes: int
    memory_limit_bytes: int


def read_snapshot(broker: Broker, world_size: int) -> BrokerSnapshot:
    """Return the state of the run and of its server; raises BrokerError."""
    status = read_status(broker, world_size)
    keys = broker.keys
    ready = [keys.ready(rank) for rank in range(world_size)]
    with broker_errors("reading the broker for its metrics"):
        pipe = broker.client.pipeline(transaction=False)
        pipe.time()
        pipe.info("memory")
        pipe.xlen(keys.named("events"))
        pipe.xlen(keys.named("rejected"))
        pipe.xrevrange(keys.named("events"), count=1)
        pipe.hget(keys.named("archive"), "cursor")
        for stream in (keys.named("segments"), keys.named("matched"), *ready):
            pipe.xrange(stream, count=1)
        replies: Any = pipe.execute()
    (seconds, microseconds), memory, num_events, num_rejected, last_event, archived, *firsts = replies
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    ages = [_age_ms(entries, now_ms) for entries in firsts]
    return BrokerSnapshot(
        status=status,
        stream_lengths={
            "segments": status.segments_waiting,
            "matched": status.matched_waiting,
            "events": int(num_events),
            "rejected": int(num_rejected),
        },
        groups={group: _read_group(broker, group) for group in STREAM_OF_GROUP},
        oldest_waiting_ms={"segments": ages[0], "matched": ages[1], "ready": max(ages[2:], default=0)},
        archive_behind_ms=_behind_ms(last_event, archived),
        used_memory_bytes=int(memory["used_memory"]),
        memory_limit_bytes=int(memory.get("maxmemory", 0)),
    )


def _read_group(broker: Broker, group: str) -> GroupState:
    stream = broker.keys.named(STREAM_OF_GROUP[group])
    with broker_errors(f"reading group {group}"):
        pipe = broker.client.pipeline(transaction=True)
        pipe.xlen(stream)
        pipe.xpending(stream, group)
        pipe.xinfo_consumers(stream, group)
        replies: Any = pipe.execute()
    length, pending, consumers = replies
    idles = [int(consumer["idle"]) for consumer in consumers]
    num_pending = int(pending["pending"])
    return GroupState(
        # settled entries are deleted, so what is neither pending nor gone was not handed out yet;
        # the server's own `lag` exists from Redis 7 on only
        lag_records=max(int(length) - num_pending, 0),
        pending_records=num_pending,
        num_active=sum(idle < ACTIVE_WITHIN_MS for idle in idles),
        idle_ms=min(idles) if idles else None,
    )


def _entry_ms(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _age_ms(entries: Sequence[Any], now_ms: int) -> int:
    return max(now_ms - _entry_ms(entries[0][0]), 0) if entries else 0


def _behind_ms(last_event: Sequence[Any], archived: bytes | None) -> int:
    """Return how far the archive is behind the log: 0 for an empty log, and before the archive began."""
    if not last_event or archived is None:
        return 0
    return max(_entry_ms(last_event[0][0]) - _entry_ms(archived), 0)
