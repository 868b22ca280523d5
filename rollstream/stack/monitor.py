"""Looks at the broker once a second and writes what it sees to the run folder.

Outlasts a broker that is away. The sample itself is pure; it must not know what anybody concludes from it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.status import RunStatus, read_status
from broker_schemas.errors import BrokerError
from broker_schemas.records.events import LogEvent

log = logging.getLogger(__name__)
SAMPLE_EVERY_S: Final = 1.0
LAG_OVER_RECORDS: Final = 64
Row = dict[str, Any]


class GeneratedLag:
    """Mean lag of the latest rollouts when they arrived: current policy version minus theirs."""

    def __init__(self, policy_version: int) -> None:
        self._policy_version = policy_version
        self._lags: deque[int] = deque(maxlen=LAG_OVER_RECORDS)

    def fold(self, events: Iterable[LogEvent]) -> None:
        """Take in further events of the log, in order."""
        for event in events:
            if event.kind == "policy_published":
                self._policy_version = max(self._policy_version, event.number("policy_version"))
            elif event.kind == "pushed":
                self._lags.extend(
                    max(self._policy_version - row.policy_version, 0) for row in event.pushed_rows()
                )

    @property
    def mean(self) -> float | None:
        """The mean over the last LAG_OVER_RECORDS rollouts, in policy versions; None before the first."""
        return fmean(self._lags) if self._lags else None


def sample_of(
    status: RunStatus | None,
    roles: Sequence[Row],
    *,
    time_ms: int,
    lag_generated_mean: float | None = None,
    broker_bytes: int | None = None,
) -> Row:
    """Return one line of ``stack_samples.jsonl``; without a status only the time and the roles."""
    sample: Row = {"time_ms": time_ms, "roles": [dict(role) for role in roles]}
    if status is None:
        return sample
    return sample | {
        "ready_depth": list(status.ready_depths),
        "segments_waiting": status.segments_waiting,
        "matched_waiting": status.matched_waiting,
        "in_flight": status.total("open_records"),
        "policy_version": status.policy_version if status.policy_version >= 0 else None,
        "optimizer_step": status.total("committed_steps"),
        "requested": status.total("requested"),
        "pushed": status.total("pushed"),
        "matched": status.total("matched"),
        "packed_segments": status.total("packed_segments"),
        "trained_segments": status.total("trained_segments"),
        "dropped": status.by_reason("dropped"),
        "rejected": status.by_reason("rejected"),
        "duplicates": status.total("duplicates"),
        "lag_generated_mean": lag_generated_mean,
        "demand_advice": status.demand_advice,
        "broker_bytes": broker_bytes if broker_bytes is not None else status.total("bytes"),
    }


class BrokerWatch:
    """Reads a run's state and follows its log for the lag; the first look starts at the end of the log."""

    def __init__(self, broker: Broker, world_size: int, *, is_own_server: bool) -> None:
        self._broker = broker
        self._world_size = world_size
        self._is_own_server = is_own_server
        self._cursor = ""
        self._lag = GeneratedLag(-1)

    def sample(self, roles: Sequence[Row], *, time_ms: int) -> Row:
        """Return a sample; raises BrokerError."""
        if not self._cursor:
            self._cursor = self._end_of_log()
            self._lag = GeneratedLag(read_status(self._broker, self._world_size).policy_version)
        events = list(read_events(self._broker, self._cursor))
        self._cursor = events[-1].event_id if events else self._cursor
        self._lag.fold(events)
        return sample_of(
            read_status(self._broker, self._world_size),
            roles,
            time_ms=time_ms,
            lag_generated_mean=self._lag.mean,
            broker_bytes=self._memory_bytes() if self._is_own_server else None,
        )

    def _end_of_log(self) -> str:
        with broker_errors("reading the end of the log"):
            last: Any = self._broker.client.xrevrange(self._broker.keys.named("events"), count=1)
        return last[0][0].decode() if last else "0-0"

    def _memory_bytes(self) -> int:
        with broker_errors("reading the broker's memory"):
            info: Any = self._broker.client.info("memory")
        return int(info["used_memory"])


class Monitor:
    """Appends a sample a second, from a thread of its own: a hanging broker must not hold up the stack."""

    def __init__(
        self,
        watch: BrokerWatch,
        path: Path,
        roles: Callable[[], Sequence[Row]],
        *,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._watch = watch
        self._path = path
        self._roles = roles
        self._now_ms = now_ms
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)
        self._trouble = ""
        self.last_sample: Row = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write a last sample."""
        if self.end():
            self.step()

    def end(self) -> bool:
        """End the thread, also one that never started; return whether it has ended in good time."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10 * SAMPLE_EVERY_S)
        return not self._thread.is_alive()

    def step(self) -> None:
        """Write one sample; a broker or a disk that fails is reported once, and tried again next time."""
        try:
            self._append(self._look())
        except OSError as exc:
            self._report(f"{self._path}: cannot be written ({exc.strerror}); samples are lost meanwhile")

    def _look(self) -> Row:
        try:
            sample = self._watch.sample(self._roles(), time_ms=self._now_ms())
        except BrokerError as exc:
            self._report(str(exc))
            return sample_of(None, self._roles(), time_ms=self._now_ms())
        self._trouble = ""
        return sample

    def _append(self, sample: Row) -> None:
        self.last_sample = sample
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(sample) + "\n")

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.info("monitor: %s", trouble)
        self._trouble = trouble

    def _loop(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.step()
