"""Every metric of every role as one table, read off the metrics themselves: docs/METRICS.md [O-3]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry

from broker_schemas.broker.status import RunStatus
from consumers.metrics import EvaluatorMetrics, MatcherMetrics, PackerMetrics
from learner.metrics import LOSS_TERMS, MILESTONES, LearnerMetrics
from producers.metrics import DispatcherMetrics, ProducerMetrics
from rollstream.history.archive_metrics import ArchiveMetrics
from rollstream.watch.broker_snapshot import BrokerSnapshot, GroupState
from rollstream.watch.exporter import ExporterSettings, families
from rollstream.watch.version_lag import VersionLag
from rollstream.wiring.access import PORT_OFFSETS

ROLE_METRICS: Final = {
    "dispatch": DispatcherMetrics,
    "produce": ProducerMetrics,
    "match": MatcherMetrics,
    "pack": PackerMetrics,
    "gather": EvaluatorMetrics,
    "learn": LearnerMetrics,
    "archive": ArchiveMetrics,
}
# metric -> column of train_log.jsonl, or key of an evaluation
TRAINING_LOG: Final = {
    "rollstream_pack_fill_ratio": "packing/post_rollout_fill",
    "rollstream_packed_segments_total": "packing/post_rollout_segments",
    "rollstream_packed_tokens_total": "packing/post_rollout_selected_total_len",
    "rollstream_pack_buffer_segments": "packing/post_rollout_buffer",
    "rollstream_learner_loss": ", ".join(dict.fromkeys(LOSS_TERMS.values())),
    "rollstream_learner_steps_total": "kind",
    "rollstream_learner_segments_total": "num_segments",
    "rollstream_learner_tokens_total": "num_tokens",
    "rollstream_learner_wait_seconds_total": "wait_s",
    "rollstream_learner_busy_seconds_total": "busy_s",
    "rollstream_learner_step_seconds": "step_s",
    "rollstream_b_step_skipped_due_to_queue_total": "reason",
    "rollstream_learner_b_step_ratio": "b_step_ratio",
    "rollstream_learner_claim_lag_versions": "lag_claimed_mean, lag_claimed_max",
    "rollstream_learner_pack_fill_ratio": "fill",
    "rollstream_learner_rollout_objects_total": "rollout/&lt;counter&gt;",
    "rollstream_learner_grad_norm": "grad_norm",
    "rollstream_learner_learning_rate": "learning_rate",
    "rollstream_learner_policy_version": "policy_version",
    "rollstream_learner_model_flops_ratio": "model_flops_utilisation",
    "rollstream_learner_peak_memory_bytes": "memory/peak_gb_&lt;rank&gt;",
    "rollstream_learner_milestone_seconds_total": ", ".join(MILESTONES),
    "rollstream_evaluation": "the label's value",
    "rollstream_round_evaluation": "the label's value",
    "rollstream_learner_checkpoint_steps": "optimizer_step",
}
_HEAD: Final = """# Metrics

This page is written from the metrics themselves (`rollstream dashboards`); change those, not this page.

- `metrics.base_port` switches the endpoints on; a process listens on it plus its role's offset and index.
- Offsets: {offsets}.
- A learner has one endpoint a rank; its counts are those of all ranks, so take `max`, not `sum`, over ranks.
- Every sample has the labels `run` and `role` of its process: scrape with `honor_labels`, however you like.
- Every process also tells `process_*` and `rollstream_build_info`, 1 with its version.
- `/healthz` answers while a process lives; `/targets` names the endpoints of all ranks of a host.
- `/readyz` answers 200 once a process has what it needs (broker, model, policy), else 503 and what it lacks.
- Counters of the exporter are sums of the run's log: they survive restarts of every role.
- A histogram `x` has the series `x_bucket`, `x_sum` and `x_count`.

| metric | type | labels | where | meaning | in the training log |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class DeclaredMetric:
    """One metric as a query names it. ``role``: the command whose endpoint shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    role: str
    meaning: str


def declared_metrics() -> list[DeclaredMetric]:
    """Return every metric of every role, by role in the order of `ROLE_METRICS`, the exporter's last."""
    found = []
    for role, metrics in ROLE_METRICS.items():
        registry = CollectorRegistry()
        owner = metrics(registry)
        labels = {
            item._name: item._labelnames for item in vars(owner).values() if hasattr(item, "_labelnames")
        }
        found += [_declared(family, role, labels[family.name]) for family in registry.collect()]
    return found + [_declared(family, "export", _labels_of(family)) for family in exported_families()]


def markdown_table() -> str:
    """Return the text of docs/METRICS.md."""
    offsets = ", ".join(f"`{role}` {offset}" for role, offset in PORT_OFFSETS.items())
    rows = (
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | `{metric.role}` "
        f"| {metric.meaning} | {TRAINING_LOG.get(metric.name, '-')} |\n"
        for metric in declared_metrics()
    )
    return _HEAD.format(offsets=offsets) + "".join(rows)


def _declared(family: Any, role: str, labels: tuple[str, ...]) -> DeclaredMetric:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return DeclaredMetric(
        name=name,
        kind=family.type,
        labels=tuple(labels),
        role=role,
        meaning=family.documentation.rstrip(".").removesuffix(f" ({TRAINING_LOG.get(name)})"),
    )


def _labels_of(family: Any) -> tuple[str, ...]:
    return tuple(family._labelnames)


def exported_families() -> Iterator[Any]:
    """Yield the exporter's families with nothing in them."""
    group = GroupState(lag_records=0, pending_records=0, num_active=0, idle_ms=0)
    status = RunStatus(
        policy_version=0,
        ready_depths=(0,),
        segments_waiting=0,
        matched_waiting=0,
        open_claims=0,
        counters={},
        open_step=None,
    )
    snapshot = BrokerSnapshot(
        status=status,
        stream_lengths={},
        groups={"matcher": group},
        oldest_waiting_ms={},
        archive_behind_ms=0,
        used_memory_bytes=0,
        memory_limit_bytes=0,
    )
    settings = ExporterSettings(
        queue_limit=8, world_size=1, version_window=0, budget_bytes=0, max_steps=0, b_ratio=0.0
    )
    return families(snapshot, VersionLag(0), settings)
