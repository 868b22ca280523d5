"""Metrics of dispatcher and producers, on a registry passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# shown at 0 before they first happen, so that a rate over them has a beginning
PUSH_STATUSES: Final = ("ok", "duplicate", "late", "too_large", "bad_id")
FAILURE_REASONS: Final = ("generation_failed",)


class ProducerMetrics:
    """What a rollout worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rollouts = Counter(
            "rollstream_rollouts_total",
            "Rollouts generated and pushed, by what the broker said.",
            ["status"],
            registry=registry,
        )
        self._tokens = Counter(
            "rollstream_rollout_tokens_total", "Response tokens generated.", registry=registry
        )
        self._generation = Histogram(
            "rollstream_generation_seconds",
            "Time to generate one chunk.",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100),
            registry=registry,
        )
        self._loading = Histogram(
            "rollstream_policy_load_seconds",
            "Time to take the weights of another policy version.",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )
        self._version = Gauge(
            "rollstream_producer_policy_version", "Version of the weights in use.", registry=registry
        )
        self._waits = Counter(
            "rollstream_producer_wait_seconds_total",
            "Time spent waiting for room in the broker.",
            registry=registry,
        )
        self._broken_jobs = Counter(
            "rollstream_broken_jobs_total",
            "Entries of the job queue that are no job, each once.",
            registry=registry,
        )
        self._sync_failures = Counter(
            "rollstream_sync_failures_total", "Weights that could not be loaded.", registry=registry
        )
        self._pauses = Counter(
            "rollstream_producer_pause_seconds_total",
            "Time spent waiting after an accident that gave a request back.",
            registry=registry,
        )
        for status in PUSH_STATUSES:
            self._rollouts.labels(status)

    def on_broken_job(self) -> None:
        self._broken_jobs.inc()

    def on_loaded(self, load_s: float) -> None:
        self._loading.observe(load_s)

    def on_paused(self, pause_s: float) -> None:
        self._pauses.inc(pause_s)

    def on_sync_failed(self) -> None:
        self._sync_failures.inc()

    def on_generated(self, num_tokens: int, generation_s: float, policy_version: int) -> None:
        self._tokens.inc(num_tokens)
        self._generation.observe(generation_s)
        self._version.set(policy_version)

    def on_pushed(self, statuses: Sequence[str], wait_s: float) -> None:
        for status in statuses:
            self._rollouts.labels(status).inc()
        self._waits.inc(wait_s)


class DispatcherMetrics:
    """What the dispatcher counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "rollstream_rollouts_requested_total", "Rollouts asked for.", registry=registry
        )
        self._asked_again = Counter(
            "rollstream_rollouts_asked_again_total",
            "Rollouts asked for again because the one before went stale.",
            registry=registry,
        )
        self._reissued = Counter(
            "rollstream_requests_reissued_total", "Requests run again after a lease ended.", registry=registry
        )
        self._failed = Counter(
            "rollstream_requests_failed_total",
            "Requests given up, by reason.",
            ["reason"],
            registry=registry,
        )
        self._broken_jobs = Counter(
            "rollstream_broken_failed_jobs_total",
            "Entries among the failed jobs that are no job, each once.",
            registry=registry,
        )
        self._generation = Gauge(
            "rollstream_generation_steps",
            "Optimizer steps from a request to the claim that its rollouts are ready for, three of four.",
            registry=registry,
        )
        self._outstanding = Gauge(
            "rollstream_outstanding_rollouts", "Rollouts asked for and not yet matched.", registry=registry
        )
        self._waiting_jobs = Gauge(
            "rollstream_waiting_jobs", "Rollout jobs that no worker has taken yet.", registry=registry
        )
        self._wanted_producers = Gauge(
            "rollstream_wanted_producers",
            "Producers that could work at once: open rollouts over the size of a request, rounded up.",
            registry=registry,
        )
        self._lowest_ready = Gauge(
            "rollstream_ready_lowest_version", "Lowest policy version of the ready packs.", registry=registry
        )
        self._until_stale = Gauge(
            "rollstream_ready_until_stale_versions",
            "Publications that the oldest ready pack still outlasts.",
            registry=registry,
        )
        for reason in FAILURE_REASONS:
            self._failed.labels(reason)

    def on_broken_job(self) -> None:
        self._broken_jobs.inc()

    def on_issued(self, num_rollouts: int, *, again: int) -> None:
        self._requests.inc(num_rollouts)
        self._asked_again.inc(again)

    def on_reissued(self, num_requests: int) -> None:
        self._reissued.inc(num_requests)

    def on_failed(self, reason: str) -> None:
        self._failed.labels(reason).inc()

    def on_jobs(self, num_waiting: int, num_wanted_producers: int) -> None:
        self._waiting_jobs.set(num_waiting)
        self._wanted_producers.set(num_wanted_producers)

    def on_ready(self, lowest_version: int, oldest_allowed: int) -> None:
        self._lowest_ready.set(lowest_version)
        self._until_stale.set(lowest_version - oldest_allowed)

    def on_generation_steps(self, num_steps: int) -> None:
        self._generation.set(num_steps)

    def on_status(self, outstanding: int) -> None:
        self._outstanding.set(outstanding)
