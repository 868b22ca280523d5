"""Every metric of every role: written down, set by somebody, and set to what it says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.records.evaluation_state import EvaluationNumbers
from broker_schemas.records.packs import ReadyPack, StepClaim
from consumers.metrics import EvaluatorMetrics, MatcherMetrics, PackerMetrics
from learner.metrics import MILESTONES, LearnerMetrics
from learner.step_report import RankPart, log_row
from learner.step_surroundings import realised_ratio
from learner.train_step import LossSums, StepUpdate
from producers.metrics import DispatcherMetrics, ProducerMetrics
from rollstream.history.archive_metrics import ArchiveMetrics
from rollstream.watch.metrics_table import ROLE_METRICS, TRAINING_LOG, declared_metrics, markdown_table
from rollstream.wiring.access import PORT_OFFSETS
from tests.builders.records import a_descriptor
from tests.source_tree import PACKAGES, ROOT, SourceFile, python_files

METRICS_FILES = (
    *(f"{role}/metrics.py" for role in ("producers", "consumers", "learner")),
    "rollstream/history/archive_metrics.py",
)


def drive_producer(metrics: ProducerMetrics) -> None:
    metrics.on_generated(120, 0.5, 7)
    metrics.on_pushed(["ok", "duplicate"], 0.25)
    metrics.on_sync_failed()
    metrics.on_paused(0.5)
    metrics.on_loaded(2.0)
    metrics.on_broken_job()


def drive_dispatcher(metrics: DispatcherMetrics) -> None:
    metrics.on_generation_steps(2)
    metrics.on_jobs(3, 4)
    metrics.on_ready(7, 5)
    metrics.on_issued(8, again=1)
    metrics.on_reissued(2)
    metrics.on_failed("generation_failed")
    metrics.on_status(5)
    metrics.on_broken_job()


def drive_matcher(metrics: MatcherMetrics) -> None:
    metrics.on_batch(["matched", "gone"], 0.01)
    metrics.on_rejected("malformed")
    metrics.on_counters({"matched": 3})


def drive_packer(metrics: PackerMetrics) -> None:
    members = [a_descriptor(f"r-{index}", encoded_length=162) for index in range(6)]
    metrics.on_pack(ReadyPack.of(members, capacity=1000), reason="filled", is_underfilled=True)
    metrics.on_dropped(stale=1, overflow=2)
    metrics.on_buffer(4)


def drive_learner(metrics: LearnerMetrics) -> None:
    claim = StepClaim(optimizer_step=3, kind="B", reason="queue_short", policy_version=2)
    sums = LossSums(
        **dict.fromkeys(("total", "ce", "slot", "soft_ce", "w1", "gate", "slot_prefix", "slot_tail"), 1.0),
        num_prefix_slots=1.0,
        num_tail_slots=1.0,
        num_segments=5,
        num_tokens=700,
        num_rows=2,
    )
    part = RankPart(sums=sums, lags=[1], fills=[0.9], busy_s=2.0, wait_s=1.0, peak_memory_bytes=[9])
    part.counters.update({"matched": 4})
    row = log_row(claim, part, StepUpdate(grad_norm=1.5, learning_rate=1e-3), step_s=3.0, time_ms=1)
    costs = dict.fromkeys((*MILESTONES, "model_flops_utilisation"), 0.25)
    metrics.on_step(claim, part, row | realised_ratio("BA") | costs)
    metrics.on_policy_published(3)
    metrics.on_evaluation({"eval_rollout_f1": 0.8})
    metrics.on_checkpoint(4)


def drive_archive(metrics: ArchiveMetrics) -> None:
    metrics.on_archived(num_events=3, size_bytes=99)


def drive_evaluator(metrics: EvaluatorMetrics) -> None:
    metrics.on_waiting(3)
    metrics.on_numbers(
        EvaluationNumbers(
            optimizer_step=8, policy_version=2, highest_policy_version=3, metrics={"eval_rollout_f1": 0.5}
        )
    )


DRIVERS: dict[str, Any] = {
    "dispatch": drive_dispatcher,
    "produce": drive_producer,
    "match": drive_matcher,
    "pack": drive_packer,
    "gather": drive_evaluator,
    "learn": drive_learner,
    "archive": drive_archive,
}


def driven(role: str) -> CollectorRegistry:
    registry = CollectorRegistry()
    DRIVERS[role](ROLE_METRICS[role](registry))
    return registry


@pytest.mark.req("O-3")
@pytest.mark.parametrize("role", sorted(ROLE_METRICS))
def test_a_role_that_does_its_work_sets_every_metric_it_declares(role: str) -> None:
    unset = [
        family.name
        for family in driven(role).collect()
        if not any(sample.value for sample in family.samples if not sample.name.endswith("_created"))
    ]
    assert not unset, f"declared, and never set by an on_ method of {role}: {unset}"


@pytest.mark.req("O-3")
def test_the_numbers_are_those_that_were_told() -> None:
    # when
    learner, packer, producer = driven("learn"), driven("pack"), driven("produce")
    # then
    assert learner.get_sample_value("rollstream_learner_tokens_total", {"kind": "B"}) == 700
    assert learner.get_sample_value("rollstream_learner_wait_seconds_total") == 1.0
    assert learner.get_sample_value("rollstream_learner_busy_seconds_total") == 2.0
    assert learner.get_sample_value("rollstream_learner_b_step_ratio") == 0.5
    skipped = "rollstream_b_step_skipped_due_to_queue_total"
    assert learner.get_sample_value(skipped, {"reason": "queue_short"}) == 1
    assert learner.get_sample_value("rollstream_learner_claim_lag_versions_sum") == 1
    assert packer.get_sample_value("rollstream_pack_fill_ratio_sum") == 0.972
    assert packer.get_sample_value("rollstream_underfilled_packs_total") == 1
    dropped = "rollstream_packer_dropped_packs_total"
    assert packer.get_sample_value(dropped, {"reason": "overflow"}) == 2
    assert producer.get_sample_value("rollstream_rollout_tokens_total") == 120


def on_methods() -> Iterator[tuple[SourceFile, ast.ClassDef, ast.FunctionDef]]:
    for file in python_files(*PACKAGES):
        if str(file.path) in METRICS_FILES:
            for owner in file.tree.body:
                if isinstance(owner, ast.ClassDef):
                    for node in owner.body:
                        if isinstance(node, ast.FunctionDef) and node.name.startswith("on_"):
                            yield file, owner, node


@pytest.mark.req("O-3")
def test_every_on_method_is_called_by_a_loop() -> None:
    called = {
        name.rpartition(".")[2]
        for file in python_files(*PACKAGES)
        if str(file.path) not in METRICS_FILES
        for name, _ in file.calls()
        if "metrics" in name
    }
    declared = {node.name for _, _, node in on_methods()}
    assert declared, "no on_ method anywhere: this test looks in the wrong place"
    assert declared <= called, f"never called by a loop: {sorted(declared - called)}"


@pytest.mark.req("O-3")
def test_every_role_with_a_port_has_metrics() -> None:
    assert {*ROLE_METRICS, "export"} == set(PORT_OFFSETS)


@pytest.mark.req("O-3")
def test_the_page_of_metrics_is_what_the_metrics_say() -> None:
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    assert page == markdown_table(), "docs/METRICS.md is old: run 'rollstream dashboards'"


def test_a_name_is_declared_once_and_explained() -> None:
    metrics = declared_metrics()
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names))
    assert all(metric.meaning for metric in metrics)
    assert set(TRAINING_LOG) <= set(names)
