"""The metrics that only the broker knows: lengths, depths, ages, lag and the sums of the log [O-3].

`families` is pure; the collector reads at every scrape, and says so when the broker does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.status import read_status
from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.errors import BrokerError
from broker_schemas.records.reasons import DROP_REASONS, REJECTION_REASONS
from rollstream.watch.broker_snapshot import BrokerSnapshot, read_snapshot
from rollstream.watch.version_lag import VersionLag, end_of_log

log = logging.getLogger(__name__)
STAGES: Final = {
    "requested": "requested",
    "pushed": "pushed",
    "matched": "matched",
    "evaluated": "evaluated",
    "packed": "packed_segments",
    "claimed": "claimed_segments",
    "trained": "trained_segments",
    "settled": "settled_segments",
}


@dataclass(frozen=True, kw_only=True)
class ExporterSettings:
    """``budget_bytes``: of the run in the broker; ``max_steps``: after them no rank is expected to be up."""

    world_size: int
    queue_limit: int
    version_window: int
    budget_bytes: int
    max_steps: int
    b_ratio: float


def families(
    snapshot: BrokerSnapshot | None, lag: VersionLag, settings: ExporterSettings
) -> Iterator[Metric]:
    """Yield every family; without a snapshot (the broker is away) only what needs none."""
    up = GaugeMetricFamily("rollstream_broker_up", "1 while the broker answers, else 0.")
    up.add_metric([], float(snapshot is not None))
    yield up
    budget = GaugeMetricFamily(
        "rollstream_run_budget_bytes", "Bytes the run may hold in the broker (broker.max_bytes)."
    )
    budget.add_metric([], settings.budget_bytes)
    yield budget
    window = GaugeMetricFamily(
        "rollstream_version_window_versions", "Largest lag that may be trained on (version_window)."
    )
    window.add_metric([], settings.version_window)
    yield window
    limit = GaugeMetricFamily(
        "rollstream_queue_limit_packs", "Most packs that wait for a rank (stage2_async.queue_limit)."
    )
    limit.add_metric([], settings.queue_limit)
    yield limit
    scheduled = GaugeMetricFamily(
        "rollstream_scheduled_b_step_ratio", "Share of B steps by schedule (stage2_ab.schedule.b_ratio)."
    )
    scheduled.add_metric([], settings.b_ratio)
    yield scheduled
    yield from lag.families()
    if snapshot is not None:
        yield from _waiting(snapshot)
        yield from _groups(snapshot)
        yield from _progress(snapshot, settings)
        yield from _sums(snapshot)
        yield from _memory(snapshot)


def _waiting(snapshot: BrokerSnapshot) -> Iterator[Metric]:
    lengths = GaugeMetricFamily(
        "rollstream_stream_length_records", "Entries of a stream of the run.", labels=["stream"]
    )
    for stream, length in snapshot.stream_lengths.items():
        lengths.add_metric([stream], length)
    yield lengths
    depth = GaugeMetricFamily(
        "rollstream_ready_depth_packs", "Packs that wait for a learner rank.", labels=["rank"]
    )
    for rank, packs in enumerate(snapshot.status.ready_depths):
        depth.add_metric([str(rank)], packs)
    yield depth
    oldest = GaugeMetricFamily(
        "rollstream_oldest_waiting_seconds",
        "Age of the oldest entry that waits, 0 for none; ready: over all ranks.",
        labels=["stream"],
    )
    for stream, age_ms in snapshot.oldest_waiting_ms.items():
        oldest.add_metric([stream], age_ms / 1000)
    yield oldest
    behind = GaugeMetricFamily(
        "rollstream_archive_behind_seconds", "Time between the last event and the last archived one."
    )
    behind.add_metric([], snapshot.archive_behind_ms / 1000)
    yield behind


def _groups(snapshot: BrokerSnapshot) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        "rollstream_group_lag_records", "Entries not handed to a consumer yet.", labels=["group"]
    )
    pending = GaugeMetricFamily(
        "rollstream_group_pending_records", "Entries handed to a consumer, not settled.", labels=["group"]
    )
    consumers = GaugeMetricFamily(
        "rollstream_group_consumers", "Consumers heard of in the last minute.", labels=["group"]
    )
    idle = GaugeMetricFamily(
        "rollstream_group_idle_seconds",
        "Time since any consumer of the group asked for something.",
        labels=["group"],
    )
    for name, group in snapshot.groups.items():
        lag.add_metric([name], group.lag_records)
        pending.add_metric([name], group.pending_records)
        consumers.add_metric([name], group.num_active)
        if group.idle_ms is not None:
            idle.add_metric([name], group.idle_ms / 1000)
    yield from (lag, pending, consumers, idle)


def _progress(snapshot: BrokerSnapshot, settings: ExporterSettings) -> Iterator[Metric]:
    status = snapshot.status
    in_flight = GaugeMetricFamily(
        "rollstream_in_flight_rollouts", "Rollouts asked for that did not come yet."
    )
    in_flight.add_metric([], status.total("open_records"))
    yield in_flight
    policy = GaugeMetricFamily("rollstream_policy_version", "Policy version in force, -1 before the first.")
    policy.add_metric([], status.policy_version)
    yield policy
    claims = GaugeMetricFamily("rollstream_open_claims_steps", "Steps claimed and not settled yet.")
    claims.add_metric([], status.open_claims)
    yield claims
    expected = GaugeMetricFamily(
        "rollstream_expected_ranks", "Learner ranks that should be up, 0 once all steps are committed."
    )
    is_done = status.total("committed_steps") >= settings.max_steps
    expected.add_metric([], 0 if is_done else settings.world_size)
    yield expected


def _sums(snapshot: BrokerSnapshot) -> Iterator[Metric]:
    status = snapshot.status
    stages = CounterMetricFamily(
        "rollstream_rollouts_by_stage_total", "Rollouts that reached a stage.", labels=["stage"]
    )
    for stage, counter in STAGES.items():
        stages.add_metric([stage], status.total(counter))
    yield stages
    dropped = CounterMetricFamily(
        "rollstream_dropped_rollouts_total", "Rollouts dropped, by reason.", labels=["reason"]
    )
    for reason, number in (_from_zero(DROP_REASONS) | status.by_reason("dropped")).items():
        dropped.add_metric([reason], number)
    yield dropped
    rejected = CounterMetricFamily(
        "rollstream_rejected_rollouts_total", "Rollouts rejected, by reason.", labels=["reason"]
    )
    for reason, number in (_from_zero(REJECTION_REASONS) | status.by_reason("rejected")).items():
        rejected.add_metric([reason], number)
    yield rejected
    duplicates = CounterMetricFamily(
        "rollstream_duplicate_rollouts_total", "Rollouts that came again and were recognised."
    )
    duplicates.add_metric([], status.total("duplicates"))
    yield duplicates
    late = CounterMetricFamily(
        "rollstream_late_rollouts_total", "Rollouts whose request was closed without them."
    )
    late.add_metric([], status.total("late"))
    yield late
    steps = CounterMetricFamily("rollstream_decided_steps_total", "Steps decided, by kind.", labels=["kind"])
    for kind in ("A", "B"):
        steps.add_metric([kind], status.total(f"steps:{kind}"))
    yield steps
    committed = CounterMetricFamily("rollstream_committed_steps_total", "Optimizer steps committed.")
    committed.add_metric([], status.total("committed_steps"))
    yield committed


def _memory(snapshot: BrokerSnapshot) -> Iterator[Metric]:
    run = GaugeMetricFamily("rollstream_run_bytes", "Bytes of rollouts and payloads the run holds.")
    run.add_metric([], snapshot.status.total("bytes"))
    yield run
    used = GaugeMetricFamily("rollstream_broker_memory_bytes", "Memory the server uses, all runs together.")
    used.add_metric([], snapshot.used_memory_bytes)
    yield used
    limit = GaugeMetricFamily(
        "rollstream_broker_memory_limit_bytes", "The server's maxmemory, 0 for no limit."
    )
    limit.add_metric([], snapshot.memory_limit_bytes)
    yield limit


class RunCollector(Collector):
    """Reads one run at every scrape; its lag counts from the end of the log at the first one."""

    def __init__(self, broker: Broker, settings: ExporterSettings) -> None:
        self._broker = broker
        self._settings = settings
        self._lag = VersionLag(-1)
        self._cursor = ""
        self._lock = threading.Lock()
        self._trouble = TroubleLog(log, "exporter")

    def collect(self) -> Iterable[Metric]:
        """Return every family as of now."""
        with self._lock:  # two scrapers would count the same events twice
            return list(families(self._look(), self._lag, self._settings))

    def _look(self) -> BrokerSnapshot | None:
        try:
            if not self._cursor:
                self._begin()
            for event in read_events(self._broker, self._cursor):
                self._lag.fold(event)
                self._cursor = event.event_id
            snapshot = read_snapshot(self._broker, self._settings.world_size)
        except BrokerError as exc:
            self._trouble.on_trouble(exc)
            return None
        self._trouble.on_well()
        return snapshot

    def _begin(self) -> None:
        self._broker.make_groups()  # whoever comes first makes them; the exporter may
        cursor = end_of_log(self._broker)
        self._lag = VersionLag(read_status(self._broker, self._settings.world_size).policy_version)
        self._cursor = cursor


def _from_zero(reasons: Iterable[str]) -> dict[str, int]:
    """Return every reason at 0, as it is before it first happens: a rate over it then has a beginning."""
    return dict.fromkeys(reasons, 0)
