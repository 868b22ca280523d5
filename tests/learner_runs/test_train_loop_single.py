"""The loop on one rank: evaluation, early stop, fallback to A, and every refusal with its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from broker_schemas.errors import DeadlinePassed, NonFiniteLoss, RunStopped
from broker_schemas.records.packs import StepClaim
from broker_schemas.records.records import MatchedSegment
from broker_schemas.records.run_status import RunStatus
from learner.checkpoints import latest_checkpoint, read_trainer_state
from learner.training_log import TrainingLog
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import one_rank, run_one, settings_for
from tests.builders.learners import COORD_IDS
from tests.builders.settings import early_stop_settings, loss_settings

torch.set_num_threads(1)


class ShortQueue(FakeBroker):
    """Never has the packs of a B step."""

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        return StepClaim(
            optimizer_step=optimizer_step,
            kind="A",
            reason="queue_short" if scheduled_kind == "B" else "schedule",
            policy_version=policy_version,
            short_ranks=(0,),
        )


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(folder / "run" / "train_log.jsonl")


def test_an_f1_at_its_target_ends_the_run_with_a_checkpoint_that_knows_it(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path, "run", eval_every_steps=2, early_stop=early_stop_settings(target=0.6), b_ratio="0"
    )
    scores = {2: 0.4, 4: 0.7}
    with TrainingLog(tmp_path / "evaluations.jsonl") as log:
        outcome = run_one(
            one_rank(),
            settings,
            FakeBroker(1),
            evaluate=lambda model, done: {"eval_rollout_f1": scores[done]},
            evaluation_log=log,
        )
    assert (outcome.optimizer_step, outcome.reason) == (4, "validation f1 0.700 reached its target 0.6")
    checkpoint = latest_checkpoint(settings.checkpoints_dir)
    assert checkpoint is not None
    state = read_trainer_state(checkpoint)
    assert (state.optimizer_step, state.best_f1, state.dataset_position) == (4, 0.7, 16)
    assert read_json_lines(tmp_path / "evaluations.jsonl") == [
        {"optimizer_step": 1, "eval_rollout_f1": 0.4},
        {"optimizer_step": 3, "eval_rollout_f1": 0.7},
    ]
    assert [row["optimizer_step"] for row in rows(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.req("L-8")
def test_the_number_of_an_evaluation_by_others_ends_the_run_when_it_comes(tmp_path: Path) -> None:
    """Policies are published every two steps; the number of step 2 is there after step 4, nobody waits."""
    settings = settings_for(
        tmp_path,
        "run",
        eval_every_steps=2,
        is_evaluated_by_others=True,
        early_stop=early_stop_settings(metric="map_50", target=0.6, patience=None),
        b_ratio="0",
    )
    asked: list[int] = []

    def read(beyond_step: int) -> list[tuple[int, dict[str, float]]]:
        asked.append(beyond_step)
        return [[], [(2, {"eval_rollout_map_50": 0.5})], [(4, {"eval_rollout_map_50": 0.7})]][len(asked) - 1]

    def refuse(model: Any, done: int) -> dict[str, float]:
        raise AssertionError("the learner evaluates nothing itself")

    outcome = run_one(one_rank(), settings, FakeBroker(1), read_evaluations=read, evaluate=refuse)
    assert (outcome.optimizer_step, outcome.reason) == (
        6,
        "validation map_50 0.700 reached its target 0.6 (after 4 steps)",
    )
    assert asked == [0, 0, 2]
    checkpoint = latest_checkpoint(settings.checkpoints_dir)
    assert checkpoint is not None
    state = read_trainer_state(checkpoint)
    assert (state.best_f1, state.best_step, state.evaluated_step) == (0.7, 4, 4)


@pytest.mark.req("O-3")
def test_the_log_says_what_the_queue_held_and_goes_on_counting_b_steps_after_a_resume(tmp_path: Path) -> None:
    broker = FakeBroker(1)
    broker.status = RunStatus(
        policy_version=0,
        ready_depths=(3,),
        segments_waiting=0,
        matched_waiting=2,
        open_claims=1,
        counters={"dropped:stale": 4},
        open_step=None,
    )
    run_one(one_rank(), settings_for(tmp_path, "run", max_steps=2), broker)
    run_one(one_rank(), settings_for(tmp_path, "run", max_steps=4), broker)
    logged = rows(tmp_path)
    assert [row["kind"] for row in logged] == ["A", "B", "A", "B"]
    assert [row["b_step_ratio"] for row in logged] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert {row["queue/depth_0"] for row in logged} == {3}
    assert {row["queue/dropped_stale"] for row in logged} == {4}
    assert [row.get("packing/post_rollout_buffer") for row in logged] == [None, 2, None, 2]


@pytest.mark.req("Q-7")
def test_a_short_queue_makes_a_scheduled_b_step_an_a_step_with_its_reason(tmp_path: Path) -> None:
    run_one(one_rank(), settings_for(tmp_path, "run", max_steps=3), ShortQueue(1))
    assert [(row["kind"], row["reason"]) for row in rows(tmp_path)] == [
        ("A", "schedule"),
        ("A", "queue_short"),
        ("A", "schedule"),
    ]


@pytest.mark.req("Q-11")
def test_rollouts_that_never_come_end_the_run_by_name(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", stall_timeout_s=0.01, max_steps=1)
    with pytest.raises(DeadlinePassed, match="optimizer step 0: its rollouts did not come"):
        run_one(one_rank(), settings, FakeBroker(1, answers_after=10**9))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_segment(tmp_path: Path) -> None:
    # a temperature this small overflows float32 in every slot
    loss = loss_settings(coord_ids=COORD_IDS, temperature_coord=1e-42)
    settings = settings_for(tmp_path, "run", loss=loss, b_ratio="1")
    with pytest.raises(NonFiniteLoss, match="s0-p0-r0"):
        run_one(one_rank(), settings, FakeBroker(1))
    assert latest_checkpoint(settings.checkpoints_dir) is None


@pytest.mark.req("M-11")
def test_a_payload_that_is_not_what_the_pack_says_ends_the_run(tmp_path: Path) -> None:
    def longer(segment: MatchedSegment) -> MatchedSegment:
        return replace(
            segment,
            token_ids=np.append(segment.token_ids, np.int32(1)),
            ce_mask=np.append(segment.ce_mask, True),
            desc_mask=np.append(segment.desc_mask, False),
        )

    settings = settings_for(tmp_path, "run", b_ratio="1")
    with pytest.raises(RunStopped, match="pack s0-p0: got segment lengths"):
        run_one(one_rank(), settings, FakeBroker(1, change_segment=longer))


@pytest.mark.req("M-13")
def test_a_segment_of_channel_a_in_a_pack_ends_the_run(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", b_ratio="1")
    broker = FakeBroker(1, change_segment=lambda segment: replace(segment, channel="A"))
    with pytest.raises(RunStopped, match="not of channel B"):
        run_one(one_rank(), settings, broker)


@pytest.mark.req("P-4")
def test_a_sample_longer_than_a_row_ends_the_run_with_advice(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", row_capacity_tokens=20, b_ratio="0")
    with pytest.raises(RunStopped, match="expected at most 20 .*global_max_length"):
        run_one(one_rank(), settings, FakeBroker(1))


@pytest.mark.req("Q-10")
def test_a_finished_run_started_again_trains_nothing_and_publishes_its_policy(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", max_steps=2)
    run_one(one_rank(), settings, FakeBroker(1))
    broker = FakeBroker(1)
    outcome = run_one(one_rank(), settings, broker)
    assert (outcome.optimizer_step, outcome.reason) == (2, "finished")
    assert broker.told == [("settle", 2), ("publish", 1)]
    assert len(rows(tmp_path)) == 2
