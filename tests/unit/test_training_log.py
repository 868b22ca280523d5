"""The training log, the report of a step over all ranks, and the metrics they feed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack, StepClaim
from broker_schemas.records.run_status import RunStatus
from learner.metrics import LearnerMetrics
from learner.model_parts import freeze_parts
from learner.step_costs import ModelWork, work_of
from learner.step_report import RankPart, cost_columns, join_parts, log_row
from learner.step_surroundings import queue_columns, realised_ratio
from learner.train_step import LossSums, StepUpdate
from learner.training_log import TrainingLog
from rollstream.run_folder import read_json_lines
from tests.builders.learners import tiny_model

UPDATE = StepUpdate(grad_norm=2.5, learning_rate=1e-3)
PACK = ReadyPack(pack_id="p-0", record_ids=("a", "b"), lengths=(10, 20), policy_version=3, fill=0.5)


def claim(kind: str = "B", **changes: Any) -> StepClaim:
    fields: dict[str, Any] = {
        "optimizer_step": 4,
        "kind": kind,
        "reason": "claimed" if kind == "B" else "schedule",
        "policy_version": 4,
        "packs": ((PACK,), (PACK,)) if kind == "B" else (),
    }
    return StepClaim(**{**fields, **changes})


def part(scale: float = 1.0, **changes: Any) -> RankPart:
    sums = LossSums(
        total=4 * scale,
        ce=3 * scale,
        slot=1 * scale,
        slot_prefix=6.0,
        slot_tail=2.0,
        num_prefix_slots=3,
        num_tail_slots=4,
        num_segments=2,
        num_tokens=30,
        num_rows=1,
    )
    fields: dict[str, Any] = {
        "sums": sums,
        "counters": Counter(matched=3, dropped_wrong_arity=1),
        "lags": [1, 0],
        "fills": [0.5],
        "busy_s": 2.0,
        "wait_s": 1.0,
    }
    return RankPart(**{**fields, **changes})


def row_of(kind: str = "B", *parts: RankPart) -> dict[str, float | int | str]:
    joined = join_parts(list(parts) or [part(), part(3.0)])
    return log_row(claim(kind), joined, UPDATE, step_s=3.5, time_ms=1000)


@pytest.mark.req("M-12", "P-9", "P-11")
def test_a_row_holds_means_over_all_segments_and_sums_over_all_ranks() -> None:
    row = row_of()
    assert row["loss"] == pytest.approx((4 + 12) / 4)
    assert row["loss_ce"] == pytest.approx((3 + 9) / 4)
    assert row["loss_coord_prefix"] == pytest.approx(12 / 6)
    assert row["loss_coord_tail"] == pytest.approx(4 / 8)
    assert (row["num_segments"], row["num_tokens"], row["num_packs"]) == (4, 60, 2)
    assert row["rollout/matched"] == 6
    assert row["rollout/dropped_wrong_arity"] == 2
    assert (row["lag_claimed_mean"], row["lag_claimed_max"]) == (0.5, 1)
    assert row["packing/post_rollout_fill"] == 0.5
    assert row["packing/post_rollout_segments"] == 2
    assert row["packing/post_rollout_selected_total_len"] == 30
    assert (row["wait_s"], row["busy_s"], row["step_s"]) == (1.0, 2.0, 3.5)


@pytest.mark.req("M-13")
def test_a_steps_have_no_rollout_names() -> None:
    assert not [name for name in row_of("A") if "/" in name]


@pytest.mark.req("O-3", "M-12")
def test_a_row_says_how_many_objects_were_found_and_how_many_rollouts_were_cut_off() -> None:
    found = part(counters=Counter(rollouts=4, truncated=1, matched=3, ground_truth_objects=5))
    row = row_of("B", found, part(counters=Counter(rollouts=4, matched=3, ground_truth_objects=7)))
    assert (row["rollout/match_rate"], row["rollout/truncated_share"]) == (0.5, 0.125)
    nothing = row_of("B", part(counters=Counter()))
    assert (nothing["rollout/match_rate"], nothing["rollout/truncated_share"]) == (0, 0)


@pytest.mark.req("O-3", "P-11", "M-13")
def test_a_row_says_what_the_queue_held_and_counted() -> None:
    status = RunStatus(
        policy_version=3,
        ready_depths=(2, 0),
        segments_waiting=1,
        matched_waiting=7,
        open_claims=0,
        counters={"dropped:stale": 5, "claims:queue_short": 4},
        open_step=None,
    )
    columns = queue_columns(status, "B")
    assert (columns["queue/depth_0"], columns["queue/depth_1"]) == (2, 0)
    assert (columns["queue/dropped_stale"], columns["queue/dropped_overflow"]) == (5, 0)
    assert columns["queue/skipped_queue_short"] == 4
    assert columns["packing/post_rollout_buffer"] == 7
    assert queue_columns(status, "A").keys() == columns.keys() - {"packing/post_rollout_buffer"}
    assert queue_columns(None, "B") == {}


@pytest.mark.req("O-3")
def test_the_realised_ratio_forgets_old_steps() -> None:
    assert realised_ratio("BBAA") == {"b_step_ratio": 0.5}
    assert realised_ratio("") == {"b_step_ratio": 0}


@pytest.mark.req("M-10")
def test_no_iou_is_in_a_row() -> None:
    assert not [name for name in row_of() if "iou" in name.lower()]


def test_a_part_survives_the_way_between_ranks() -> None:
    sent = part(is_stop_requested=True)
    assert RankPart.from_body(json.loads(json.dumps(sent.to_body()))) == sent


def test_a_step_without_slots_or_segments_is_zero_not_an_error() -> None:
    row = row_of("B", RankPart())
    assert (row["loss"], row["loss_coord_prefix"], row["fill"], row["lag_claimed_max"]) == (0, 0, 0, 0)


def test_one_rank_that_was_asked_to_stop_stops_all() -> None:
    assert join_parts([part(), part(is_stop_requested=True)]).is_stop_requested
    assert not join_parts([part(), part()]).is_stop_requested


def test_rows_are_json_lines_that_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "train_log.jsonl"
    with TrainingLog(path) as log:
        log.write({"optimizer_step": 0, "loss": 1.5, "kind": "A"})
        assert read_json_lines(path) == [{"optimizer_step": 0, "loss": 1.5, "kind": "A"}]
    with TrainingLog(path) as log:
        log.write({"optimizer_step": 1, "loss": 1.25, "kind": "B"})
    assert [row["optimizer_step"] for row in read_json_lines(path)] == [0, 1]


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    path.write_bytes(b'{"optimizer_step": 0}\n{"optimizer_st')
    with TrainingLog(path) as log:
        log.write({"optimizer_step": 1})
    assert read_json_lines(path) == [{"optimizer_step": 0}, {"optimizer_step": 1}]


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


@pytest.mark.req("O-3", "M-12", "Q-7")
def test_metrics_count_steps_skips_objects_lag_and_time() -> None:
    registry = CollectorRegistry()
    metrics = LearnerMetrics(registry)
    joined = join_parts([part(), part()])
    metrics.on_step(claim(), joined, row_of("B", part(), part()) | realised_ratio("BA"))
    skipped = claim("A", reason="queue_short", short_ranks=(1,))
    metrics.on_step(
        skipped, join_parts([part(counters=Counter(), lags=[])]), row_of("A") | realised_ratio("BAAA")
    )
    metrics.on_policy_published(5)
    metrics.on_checkpoint(8)
    metrics.on_evaluation({"eval_rollout_f1": 0.75})
    assert sample(registry, "rollstream_learner_steps_total", kind="B") == 1
    assert sample(registry, "rollstream_learner_steps_total", kind="A") == 1
    assert sample(registry, "rollstream_b_step_skipped_due_to_queue_total", reason="queue_short") == 1
    assert sample(registry, "rollstream_learner_rollout_objects_total", counter="matched") == 6
    assert sample(registry, "rollstream_learner_segments_total", kind="B") == 4
    assert sample(registry, "rollstream_learner_tokens_total", kind="B") == 60
    assert sample(registry, "rollstream_learner_claim_lag_versions_count") == 4
    assert sample(registry, "rollstream_learner_b_step_ratio") == 0.25
    assert sample(registry, "rollstream_learner_wait_seconds_total") == 2.0
    assert sample(registry, "rollstream_learner_busy_seconds_total") == 4.0
    assert sample(registry, "rollstream_learner_policy_version") == 5
    assert sample(registry, "rollstream_learner_checkpoint_steps") == 8
    assert sample(registry, "rollstream_evaluation", metric="eval_rollout_f1") == 0.75
    assert sample(registry, "rollstream_learner_loss", kind="B", term="total") == pytest.approx(2.0)


def test_counters_are_there_before_the_first_step() -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    assert sample(registry, "rollstream_b_step_skipped_due_to_queue_total", reason="queue_short") == 0
    assert sample(registry, "rollstream_learner_steps_total", kind="B") == 0


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_nothing_is_logged_into_a_file_that_is_no_longer_there(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with TrainingLog(folder / "train_log.jsonl") as log:
        log.write({"optimizer_step": 0})
        if how == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            (folder / "train_log.jsonl").unlink()

        with pytest.raises(RunStopped, match="moved, replaced or removed"):
            log.write({"optimizer_step": 1})


@pytest.mark.req("L-11")
def test_what_a_step_cost_is_over_all_ranks_and_memory_by_rank() -> None:
    work = ModelWork(per_token=1e9, per_patch=2e9, per_supervised=0.0)
    joined = join_parts([part(peak_memory_bytes=[3 * 10**9]), part(peak_memory_bytes=[2 * 10**9])])
    assert cost_columns(joined, work, step_s=0.5, peak_flops_per_s=1e12) == {
        "tokens_per_s": 120.0,
        "model_tflops_per_s": pytest.approx(0.12),
        "model_flops_utilisation": pytest.approx(0.06),
        "memory/peak_gb_0": 3.0,
        "memory/peak_gb_1": 2.0,
    }
    unknown = cost_columns(joined, work, step_s=0.5, peak_flops_per_s=None)
    assert "model_flops_utilisation" not in unknown


@pytest.mark.req("L-11")
def test_frozen_weights_cost_less_and_none_is_counted_twice() -> None:
    model = tiny_model()
    head = model.get_output_embeddings().weight
    vision = sum(p.numel() for name, p in model.named_parameters() if "visual." in name)
    text = sum(p.numel() for name, p in model.named_parameters()) - vision - head.numel()
    assert work_of(model) == ModelWork(
        per_token=6.0 * text, per_patch=6.0 * vision, per_supervised=6.0 * head.numel()
    )
    freeze_parts(model, ("vision", "merger"))
    head.requires_grad_(False)
    assert work_of(model) == ModelWork(
        per_token=6.0 * text, per_patch=2.0 * vision, per_supervised=4.0 * head.numel()
    )
