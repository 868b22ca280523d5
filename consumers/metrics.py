"""Metrics of matcher and packer, on a registry passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from broker_schemas.records.evaluation_state import EvaluationNumbers
from broker_schemas.records.packs import ReadyPack

# shown at 0 before they first happen, so that a rate over them has a beginning
OUTCOMES: Final = ("matched", "evaluated", "dropped", "rejected", "gone")


class MatcherMetrics:
    """What a matcher counts; the counters of M-12 by name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._verdicts = Counter(
            "rollstream_matches_total", "Rollouts committed, by outcome.", ["outcome"], registry=registry
        )
        self._rejected = Counter(
            "rollstream_match_rejections_total",
            "Rollouts rejected, by reason.",
            ["reason"],
            registry=registry,
        )
        self._objects = Counter(
            "rollstream_rollout_objects_total",
            "Objects and rollouts counted while parsing and matching, by what they were.",
            ["counter"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rollstream_match_seconds",
            "Time to parse, match and build one batch, over its rollouts.",
            buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._verdicts.labels(outcome)

    def on_batch(self, statuses: Sequence[str], seconds: float) -> None:
        for status in statuses:
            self._verdicts.labels(status).inc()
        if statuses:
            self._seconds.observe(seconds / len(statuses))

    def on_rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def on_counters(self, counters: Mapping[str, int]) -> None:
        for name, number in counters.items():
            self._objects.labels(name).inc(number)


class EvaluatorMetrics:
    """What the evaluator tells: the numbers of the last round, and how far the next one is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._numbers = Gauge(
            "rollstream_round_evaluation", "Last evaluation by the producers", ["metric"], registry=registry
        )
        self._version = Gauge(
            "rollstream_evaluated_policy_version",
            "Policy version of the last evaluation by the producers.",
            registry=registry,
        )
        self._waiting = Gauge(
            "rollstream_evaluation_waiting_records",
            "Results of the evaluation that is under way.",
            registry=registry,
        )

    def on_waiting(self, num_results: int) -> None:
        self._waiting.set(num_results)

    def on_numbers(self, numbers: EvaluationNumbers) -> None:
        self._version.set(numbers.policy_version)
        for name, value in numbers.metrics.items():
            self._numbers.labels(name).set(value)


class PackerMetrics:
    """What the packer counts; names of P-11 in the training log are in brackets."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._packs = Counter(
            "rollstream_packs_total", "Packs made, by why they left.", ["reason"], registry=registry
        )
        self._fill = Histogram(
            "rollstream_pack_fill_ratio",
            "Tokens of a pack over its capacity (packing/post_rollout_fill).",
            buckets=(0.25, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 1.0),
            registry=registry,
        )
        self._segments = Counter(
            "rollstream_packed_segments_total",
            "Segments packed (packing/post_rollout_segments).",
            registry=registry,
        )
        self._tokens = Counter(
            "rollstream_packed_tokens_total",
            "Tokens packed (packing/post_rollout_selected_total_len).",
            registry=registry,
        )
        self._underfilled = Counter(
            "rollstream_underfilled_packs_total",
            "Packs that left below training.packing_min_fill_ratio.",
            registry=registry,
        )
        self._buffer = Gauge(
            "rollstream_pack_buffer_segments",
            "Segments held (packing/post_rollout_buffer).",
            registry=registry,
        )
        self._dropped = Counter(
            "rollstream_packer_dropped_packs_total",
            "Packs dropped, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in ("stale", "overflow"):
            self._dropped.labels(reason)

    def on_pack(self, pack: ReadyPack, *, reason: str, is_underfilled: bool) -> None:
        self._packs.labels(reason).inc()
        self._fill.observe(pack.fill)
        self._segments.inc(len(pack.record_ids))
        self._tokens.inc(pack.total_tokens)
        self._underfilled.inc(is_underfilled)

    def on_dropped(self, *, stale: int, overflow: int) -> None:
        self._dropped.labels("stale").inc(stale)
        self._dropped.labels("overflow").inc(overflow)

    def on_buffer(self, num_segments: int) -> None:
        self._buffer.set(num_segments)
