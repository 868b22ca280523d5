"""The learner's Prometheus metrics, on a registry passed in; the loop calls ``on_…`` methods."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from broker_schemas.records.packs import StepClaim
from broker_schemas.records.reasons import SKIP_REASONS
from learner.step_report import LogRow, RankPart
from learner.step_surroundings import REALISED_RATIO_STEPS

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FILLS: Final = (0.1, 0.25, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 1.0)
_LAGS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16)
LOSS_TERMS: Final = {
    "total": "loss",
    "ce": "loss_ce",
    "coord": "loss_coord",
    "coord_prefix": "loss_coord_prefix",
    "coord_tail": "loss_coord_tail",
    "soft_ce": "loss_coord_soft_ce",
    "w1": "loss_coord_w1",
    "gate": "loss_coord_gate",
    "duplicates": "loss_duplicates",
}

MILESTONES: Final = {
    "load_s": "load",
    "publication_s": "publication",
    "sync_s": "sync",
    "checkpoint_s": "checkpoint",
    "checkpoint_held_s": "checkpoint_held",
}
"""Column of the training log -> label value."""


class LearnerMetrics:
    """Counts of one learner process. Label values: kinds A and B,
    loss terms, claim reasons, M-12 counter names.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._declare_steps(registry)
        self._declare_queue(registry)
        self._declare_progress(registry)
        self._declare_costs(registry)
        for kind in ("A", "B"):
            for labelled in (self._steps, self._segments, self._tokens):
                labelled.labels(kind)
        for reason in SKIP_REASONS:
            self._skipped.labels(reason)

    def _declare_steps(self, registry: CollectorRegistry) -> None:
        self._steps = Counter(
            "rollstream_learner_steps_total", "Optimizer steps trained", ["kind"], registry=registry
        )
        self._loss = Gauge(
            "rollstream_learner_loss", "Loss of the last step", ["kind", "term"], registry=registry
        )
        self._segments = Counter(
            "rollstream_learner_segments_total", "Segments trained", ["kind"], registry=registry
        )
        self._tokens = Counter(
            "rollstream_learner_tokens_total", "Tokens trained", ["kind"], registry=registry
        )
        self._wait = Counter(
            "rollstream_learner_wait_seconds_total",
            "Waiting for decisions, rows and ranks",
            registry=registry,
        )
        self._busy = Counter(
            "rollstream_learner_busy_seconds_total", "Forward, backward and update", registry=registry
        )
        self._step_seconds = Histogram(
            "rollstream_learner_step_seconds", "One optimizer step", registry=registry, buckets=_SECONDS
        )

    def _declare_queue(self, registry: CollectorRegistry) -> None:
        self._skipped = Counter(
            "rollstream_b_step_skipped_due_to_queue_total",
            "B steps by schedule that became A steps",
            ["reason"],
            registry=registry,
        )
        self._b_ratio = Gauge(
            "rollstream_learner_b_step_ratio",
            f"Realised share of B steps over the last {REALISED_RATIO_STEPS}",
            registry=registry,
        )
        self._lag = Histogram(
            "rollstream_learner_claim_lag_versions",
            "Policy versions between a segment and its step",
            registry=registry,
            buckets=_LAGS,
        )
        self._fill = Histogram(
            "rollstream_learner_pack_fill_ratio",
            "Tokens over capacity",
            ["kind"],
            registry=registry,
            buckets=_FILLS,
        )
        self._rollouts = Counter(
            "rollstream_learner_rollout_objects_total",
            "Counts of M-12 over trained rollouts",
            ["counter"],
            registry=registry,
        )

    def _declare_progress(self, registry: CollectorRegistry) -> None:
        self._grad_norm = Gauge(
            "rollstream_learner_grad_norm", "Gradient norm before clipping", registry=registry
        )
        self._learning_rate = Gauge(
            "rollstream_learner_learning_rate", "Learning rate of the last step", registry=registry
        )
        self._policy_version = Gauge(
            "rollstream_learner_policy_version", "Policy version last published", registry=registry
        )
        self._evaluation = Gauge("rollstream_evaluation", "Last evaluation", ["metric"], registry=registry)
        self._checkpoint_step = Gauge(
            "rollstream_learner_checkpoint_steps",
            "Optimizer steps covered by a checkpoint",
            registry=registry,
        )

    def _declare_costs(self, registry: CollectorRegistry) -> None:
        self._utilisation = Gauge(
            "rollstream_learner_model_flops_ratio",
            "Operations of the model in the last step over its devices' peak",
            registry=registry,
        )
        self._peak_memory = Gauge(
            "rollstream_learner_peak_memory_bytes",
            "Most memory of any rank: of the GPU in the last step, of the process on a CPU",
            registry=registry,
        )
        self._milestone_seconds = Counter(
            "rollstream_learner_milestone_seconds_total",
            "Seconds of loading, publications, syncs and checkpoints; held: training waited for a checkpoint",
            ["what"],
            registry=registry,
        )
        for what in MILESTONES.values():
            self._milestone_seconds.labels(what)

    def on_step(self, claim: StepClaim, joined: RankPart, row: LogRow) -> None:
        """Note a trained step: its claim, what all ranks did, and its log row."""
        kind = claim.kind
        self._steps.labels(kind).inc()
        self._segments.labels(kind).inc(joined.sums.num_segments)
        self._tokens.labels(kind).inc(joined.sums.num_tokens)
        for term, column in LOSS_TERMS.items():
            self._loss.labels(kind, term).set(float(row[column]))
        if claim.reason not in ("schedule", "claimed"):
            self._skipped.labels(claim.reason).inc()
        self._b_ratio.set(float(row["b_step_ratio"]))
        self._grad_norm.set(float(row["grad_norm"]))
        self._learning_rate.set(float(row["learning_rate"]))
        self._step_seconds.observe(float(row["step_s"]))
        self._wait.inc(joined.wait_s)
        self._busy.inc(joined.busy_s)
        for lag in joined.lags:
            self._lag.observe(lag)
        for fill in joined.fills:
            self._fill.labels(kind).observe(fill)
        self._utilisation.set(float(row.get("model_flops_utilisation", 0.0)))
        self._peak_memory.set(max(joined.peak_memory_bytes, default=0))
        for column, what in MILESTONES.items():
            self._milestone_seconds.labels(what).inc(float(row.get(column, 0.0)))
        for name, count in joined.counters.items():
            self._rollouts.labels(name).inc(count)

    def on_policy_published(self, policy_version: int) -> None:
        """Note a published policy version."""
        self._policy_version.set(policy_version)

    def on_evaluation(self, results: dict[str, float]) -> None:
        """Note an evaluation's numbers by their keys."""
        for name, value in results.items():
            self._evaluation.labels(name).set(value)

    def on_checkpoint(self, optimizer_step: int) -> None:
        """Note that a checkpoint covers the steps below ``optimizer_step``."""
        self._checkpoint_step.set(optimizer_step)
