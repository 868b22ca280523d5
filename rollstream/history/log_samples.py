"""Folds the log of a run into what a look at its broker would have said, second by second. Pure.

So a run that is over, or ran in containers or on other machines, is seen as one that `up` started.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from broker_schemas.errors import RecordError
from broker_schemas.records import codec
from broker_schemas.records.events import LogEvent

SAMPLE_EVERY_MS: Final = 1000
FARTHEST_APART_MS: Final = 8_000
MOST_ROWS: Final = 7_200
LONGEST_QUIET_MS: Final = 15_000
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


class QueueState:
    """Where how many rollouts are, after the events so far; ``row`` has the fields of a broker's sample.

    What the log does not hold (duplicates, bytes, advice) is None or empty. Memory: what is under way.
    """

    def __init__(self, world_size: int) -> None:
        self._open: set[str] = set()
        self._evaluating: set[str] = set()  # they are in no sum of training
        self._place: dict[str, str] = {}  # id -> "segments", "matched" or the id of its pack
        self._rank_of_pack: dict[str, int] = {}
        self._claimed: dict[int, int] = {}
        self._depths = [0] * world_size
        self._sums: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._policy_version: int | None = None
        self._lag = GeneratedLag(-1)

    def fold(self, event: LogEvent) -> None:
        """Take in the next event; kinds that move no rollout change nothing."""
        self._lag.fold([event])
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            handler(self, event)

    def row(self, time_ms: int) -> Row:
        """Return the state as one line of samples."""
        return {
            "time_ms": time_ms,
            "roles": [],
            "ready_depth": list(self._depths),
            "segments_waiting": self._waiting["segments"],
            "matched_waiting": self._waiting["matched"],
            "in_flight": len(self._open),
            "policy_version": self._policy_version,
            "optimizer_step": self._sums["steps"],
            "requested": self._sums["requested"],
            "pushed": self._sums["pushed"],
            "matched": self._sums["matched"],
            "packed_segments": self._sums["packed_segments"],
            "trained_segments": self._sums["trained_segments"],
            "dropped": dict(self._dropped),
            "rejected": dict(self._rejected),
            "duplicates": None,
            "lag_generated_mean": self._lag.mean,
            "demand_advice": "",
            "broker_bytes": None,
        }

    def _put(self, record_id: str, place: str) -> None:
        self._take(record_id)
        self._place[record_id] = place
        self._waiting[place] += 1

    def _take(self, record_id: str) -> None:
        place = self._place.pop(record_id, None)
        if place is not None:
            self._waiting[place] -= 1
            if not self._waiting[place]:
                del self._waiting[place]
            self._take_pack(place)

    def _take_pack(self, pack_id: str) -> None:
        rank = self._rank_of_pack.pop(pack_id, None)
        if rank is not None:
            self._depths[rank] -= 1

    def on_requested(self, event: LogEvent) -> None:
        ids = event.ids()
        if event.text("purpose") == "evaluation":
            self._evaluating.update(ids)
            return
        self._open.update(ids)
        self._sums["requested"] += len(ids)

    def on_request_failed(self, event: LogEvent) -> None:
        missing = self._open.intersection(event.ids())  # others of the request came before it was given up
        self._open -= missing
        self._evaluating -= {record_id for record_id in event.ids() if record_id not in self._place}
        if missing:
            self._rejected[event.text("reason")] += len(missing)

    def on_pushed(self, event: LogEvent) -> None:
        for row in event.pushed_rows():
            self._open.discard(row.record_id)
            self._put(row.record_id, "segments")
            if row.purpose == "evaluation":
                self._evaluating.add(row.record_id)
            else:
                self._sums["pushed"] += 1

    def on_matched(self, event: LogEvent) -> None:
        for row in event.matched_rows():
            self._put(row.record_id, "matched")
            self._sums["matched"] += 1

    def on_evaluated(self, event: LogEvent) -> None:
        for record_id in event.ids():
            self._take(record_id)
            self._evaluating.discard(record_id)

    def on_rejected(self, event: LogEvent) -> None:
        for row in event.rejected_rows():
            self._take(row.record_id)
            if row.record_id in self._evaluating:
                self._evaluating.discard(row.record_id)
            else:
                self._rejected[row.reason] += 1

    def on_dropped(self, event: LogEvent) -> None:
        ids = event.ids()
        for record_id in ids:
            self._take(record_id)
        of_training = [record_id for record_id in ids if record_id not in self._evaluating]
        self._evaluating.difference_update(ids)
        if of_training:
            self._dropped[event.text("reason")] += len(of_training)

    def on_packed(self, event: LogEvent) -> None:
        ids, pack_id, rank = event.ids(), event.text("pack_id"), event.number("rank")
        self._depths += [0] * (rank + 1 - len(self._depths))
        for record_id in ids:
            self._put(record_id, pack_id)
        self._rank_of_pack[pack_id] = rank
        self._depths[rank] += 1
        self._sums["packed_segments"] += len(ids)

    def on_claimed(self, event: LogEvent) -> None:
        taken = [record_id for pack in event.claimed_packs() for record_id in pack.record_ids]
        for record_id in taken:
            self._take(record_id)
        self._claimed[event.number("optimizer_step")] = len(taken)

    def on_committed(self, event: LogEvent) -> None:
        self._sums["trained_segments"] += self._claimed.pop(event.number("optimizer_step"), 0)
        self._sums["steps"] += 1

    def on_quarantined(self, event: LogEvent) -> None:
        step, rows = event.number("optimizer_step"), event.rejected_rows()
        for row in rows:
            self._rejected[row.reason] += 1
        if step in self._claimed:
            self._claimed[step] -= len(rows)
        else:
            self._sums["trained_segments"] -= len(rows)

    def on_policy_published(self, event: LogEvent) -> None:
        self._policy_version = max(self._policy_version or 0, event.number("policy_version"))


_HANDLERS: Final[Mapping[str, Callable[[QueueState, LogEvent], None]]] = {
    "requested": QueueState.on_requested,
    "request_failed": QueueState.on_request_failed,
    "pushed": QueueState.on_pushed,
    "matched": QueueState.on_matched,
    "evaluated": QueueState.on_evaluated,
    "rejected": QueueState.on_rejected,
    "dropped": QueueState.on_dropped,
    "packed": QueueState.on_packed,
    "claimed": QueueState.on_claimed,
    "committed": QueueState.on_committed,
    "quarantined": QueueState.on_quarantined,
    "policy_published": QueueState.on_policy_published,
}


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run as its log tells it, oldest first: samples of the queue, and lines of committed steps.

    ``trouble``: why its broker was not asked, where it should have been.
    """

    samples: list[Row]
    steps: list[Row]
    trouble: str = ""


class _Clock:
    """When samples are due: evenly, a second apart, farther apart once there are very many."""

    def __init__(self) -> None:
        self._every_ms = SAMPLE_EVERY_MS
        self.rows: list[Row] = []
        self.due_ms = -1

    def sample(self, state: QueueState, upto_ms: int) -> None:
        """Note the state at every moment that is due, up to a time."""
        while self.due_ms <= upto_ms:
            self.rows.append(state.row(self.due_ms))
            if len(self.rows) >= MOST_ROWS and self._every_ms < FARTHEST_APART_MS:
                self.rows, self._every_ms = self.rows[::2], 2 * self._every_ms
            self.due_ms += self._every_ms


def logged_run(events: Iterable[LogEvent], world_size: int) -> LoggedRun:
    """Return samples at even times from the first event to the last one; nothing for no events.

    A pause that a new holder of a place ends has none: nothing ran then.
    """
    state, clock, steps = QueueState(world_size), _Clock(), list[Row]()
    now_ms = -1
    for event in events:
        if clock.due_ms < 0:
            clock.due_ms = event.at_ms
        elif event.kind == "lease_taken" and event.at_ms - now_ms > LONGEST_QUIET_MS:
            clock.sample(state, now_ms)
            clock.due_ms = event.at_ms
        else:
            clock.sample(state, event.at_ms - 1)
        state.fold(event)
        steps += step_rows([event])
        now_ms = event.at_ms
    return LoggedRun(samples=[*clock.rows, state.row(now_ms)] if now_ms >= 0 else [], steps=steps)


def step_rows(events: Iterable[LogEvent]) -> list[Row]:
    """Return the lines of the training log that the learner told with the steps it committed."""
    rows = []
    for event in events:
        if event.kind == "committed":
            try:
                told = codec.decode_map(event.fields.get("summary", b""))
            except RecordError:
                told = {}
            rows.append({"time_ms": event.at_ms, **told, "optimizer_step": event.number("optimizer_step")})
    return rows
