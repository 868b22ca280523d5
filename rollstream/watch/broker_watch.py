"""What a look at a run's broker says, as one line of samples; `history.log_samples` says the same of the log.

It must not know what anybody concludes from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.evaluation_rounds import read_evaluation_state, read_numbers
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.status import RunStatus, read_status
from broker_schemas.records.events import LogEvent, event_from_entry
from rollstream.history.log_samples import GeneratedLag, Row, step_rows
from rollstream.watch.version_lag import end_of_log

LATEST_EVENTS: Final = 2000
LATEST_STEPS: Final = 500
SHOWN_METRIC: Final = "eval_rollout_f1"


def sample_of(
    status: RunStatus | None,
    roles: Sequence[Row],
    *,
    time_ms: int,
    lag_generated_mean: float | None = None,
    broker_bytes: int | None = None,
    trouble: str = "",
) -> Row:
    """Return one line of samples; without a status only time, roles and ``broker_trouble``, if any."""
    sample: Row = {"time_ms": time_ms, "roles": [dict(role) for role in roles]}
    if status is None:
        return sample | ({"broker_trouble": trouble} if trouble else {})
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


class Steps:
    """Steps that were committed since somebody last asked for them; the oldest are forgotten."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque(maxlen=LATEST_STEPS)

    def add(self, events: Iterable[LogEvent]) -> None:
        """Take in further events of the log."""
        self._rows.extend(step_rows(events))

    def read_new(self) -> list[Row]:
        """Return what came since the last call, oldest first."""
        found = []
        while self._rows:
            found.append(self._rows.popleft())
        return found


class BrokerWatch:
    """Reads a run's state and follows its log for the lag; the first look starts at the end of the log."""

    def __init__(self, broker: Broker, world_size: int, *, is_own_server: bool) -> None:
        self._broker = broker
        self._world_size = world_size
        self._is_own_server = is_own_server
        self._cursor = ""
        self._lag = GeneratedLag(-1)
        self._evaluated: tuple[int, Row] = (0, {})
        self.steps = Steps()

    def sample(self, roles: Sequence[Row], *, time_ms: int) -> Row:
        """Return a sample; raises BrokerError."""
        if not self._cursor:
            self._cursor = end_of_log(self._broker)
            self.steps.add(self._latest_events())
            self._lag = GeneratedLag(read_status(self._broker, self._world_size).policy_version)
        events = list(read_events(self._broker, self._cursor))
        self._cursor = events[-1].event_id if events else self._cursor
        self._lag.fold(events)
        self.steps.add(events)
        sample = sample_of(
            read_status(self._broker, self._world_size),
            roles,
            time_ms=time_ms,
            lag_generated_mean=self._lag.mean,
            broker_bytes=self._memory_bytes() if self._is_own_server else None,
        )
        return sample | self._evaluation()

    def _evaluation(self) -> Row:
        """Return the latest round of evaluation and the numbers of the last settled one; {} without any."""
        state = read_evaluation_state(self._broker)
        if not state.policy_version:
            return {}
        if state.settled != self._evaluated[0]:
            numbers = read_numbers(self._broker)
            told = [
                {"evaluated_version": each.policy_version, "f1": each.metrics.get(SHOWN_METRIC)}
                for each in numbers[-1:]
            ]
            self._evaluated = (state.settled, told[0] if told else {})
        now = {
            "policy_version": state.policy_version,
            "asked": state.num_asked,
            "outstanding": state.num_outstanding,
            "is_settled": state.settled >= state.policy_version,
        }
        return {"evaluation": now | self._evaluated[1]}

    def _latest_events(self) -> list[LogEvent]:
        with broker_errors("reading the end of the log"):
            found: Any = self._broker.client.xrevrange(
                self._broker.keys.named("events"), max=self._cursor, count=LATEST_EVENTS
            )
        return [event_from_entry(entry_id, fields) for entry_id, fields in reversed(found)]

    def _memory_bytes(self) -> int:
        with broker_errors("reading the broker's memory"):
            info: Any = self._broker.client.info("memory")
        return int(info["used_memory"])
