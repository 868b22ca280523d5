"""The whole loop on two gloo ranks: as one rank, through kill and resume, out together on a failure."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from broker_schemas.errors import RollstreamError
from broker_schemas.records.records import MatchedSegment
from learner import checkpoint_writing
from learner.checkpoints import latest_checkpoint
from learner.stop_request import StopRequest
from learner.train_loop import LearnerOutcome
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import NUM_STEPS, one_rank, run_one, settings_for, untimed, weights_in
from tests.distributed.rank_processes import meet, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = read_json_lines(folder / name / "train_log.jsonl")
    return [untimed(row) for row in rows]


def final_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder / name / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{NUM_STEPS}"
    return weights_in(checkpoint)


def _straight(rank: int, folder: Path) -> None:
    ranks = meet(folder, "straight", rank)
    broker = FakeBroker(2, path=folder / f"told-{rank}.jsonl", answers_after=2)
    outcome = run_one(ranks, settings_for(folder, "straight"), broker)
    assert outcome == LearnerOutcome(optimizer_step=NUM_STEPS, reason="finished")
    ranks.close()


def _killed(rank: int, folder: Path) -> None:
    def die(optimizer_step: int) -> None:
        if optimizer_step == 3:
            os._exit(9)

    def sync_or_hang(descriptor: int) -> None:
        if rank == 1 and "checkpoint-3" in os.readlink(f"/proc/self/fd/{descriptor}"):
            Event().wait(60)
        real_sync(descriptor)

    real_sync, os.fsync = os.fsync, sync_or_hang
    checkpoint_writing._LEAVE_WITHIN_S = 0.2  # type: ignore[misc]
    ranks = meet(folder, "killed", rank, stall_timeout_s=3)
    broker = FakeBroker(2, on_commit=die)
    settings = settings_for(folder, "killed", stall_timeout_s=3.0, save_every_steps=1)
    try:
        run_one(ranks, settings, broker)
    except RollstreamError as error:
        (folder / f"reason-{rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _resumed(rank: int, folder: Path) -> None:
    ranks = meet(folder, "resumed", rank)
    run_one(ranks, settings_for(folder, "killed"), FakeBroker(2))
    ranks.close()


def _broken_segment(segment: MatchedSegment) -> MatchedSegment:
    return replace(segment, processor_fingerprint="other") if segment.record_id == "s1-p1-r2" else segment


def _quarantined(rank: int, folder: Path) -> None:
    ranks = meet(folder, "quarantined", rank)
    broker = FakeBroker(2, change_segment=_broken_segment, path=folder / f"quarantined-{rank}.jsonl")
    run_one(ranks, settings_for(folder, "quarantined", max_steps=2), broker)
    ranks.close()


def _stopped(rank: int, folder: Path) -> None:
    stop = StopRequest()
    ranks = meet(folder, "stopped", rank)

    def ask_on_step_2(row: dict[str, Any]) -> None:
        if row["optimizer_step"] == 2:
            stop.set()

    outcome = run_one(ranks, settings_for(folder, "stopped"), FakeBroker(2), stop=stop, on_step=ask_on_step_2)
    # asked on rank 0 after step 2: it makes no further claim, and rank 1 hears that
    assert outcome == LearnerOutcome(optimizer_step=3, reason="stop_requested")
    ranks.close()


def _leave_at_once(rank: int, folder: Path) -> None:
    """End like a killed rank: its checkpoint hangs in a thread that would be waited for."""
    os._exit(0 if rank else 1)


def _all_in_turn(rank: int, folder: Path) -> None:
    _straight(rank, folder)
    _quarantined(rank, folder)
    _stopped(rank, folder)
    _killed(rank, folder)
    _leave_at_once(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every scenario once: two pairs of processes, then one rank in this process."""
    folder = tmp_path_factory.mktemp("loop")
    assert run_ranks(_all_in_turn, folder, timeout_s=300) == [9, 0]
    left = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
    assert [name.partition("-3-")[0] for name in left] == [
        ".writing-checkpoint",
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert run_ranks(_resumed, folder, timeout_s=300) == [0, 0]
    torch.set_num_threads(1)
    settings = settings_for(folder, "one-rank", gradient_accumulation_steps=2)
    assert run_one(one_rank(), settings, FakeBroker(1)).reason == "finished"
    return folder


@pytest.mark.req("P-9", "Q-7", "Q-9")
def test_two_ranks_have_the_losses_of_one_rank(folder: Path) -> None:
    two, one = rows_of(folder, "straight"), rows_of(folder, "one-rank")
    assert [row["kind"] for row in two] == ["A", "B", "A", "B", "A", "B"]
    assert len(two) == len(one) == NUM_STEPS
    for pair in zip(two, one, strict=True):
        for name in ("loss", "loss_ce", "loss_coord", "grad_norm", "loss_coord_prefix", "loss_coord_tail"):
            assert pair[0][name] == pytest.approx(pair[1][name], rel=1e-4), (pair[0]["optimizer_step"], name)
        assert pair[0]["num_segments"] == pair[1]["num_segments"]
    assert two[-1]["loss"] < two[1]["loss"]


@pytest.mark.req("L-6", "Q-10")
def test_a_killed_and_resumed_run_has_the_same_losses_and_weights_bit_for_bit(folder: Path) -> None:
    straight, killed = rows_of(folder, "straight"), rows_of(folder, "killed")
    # killed while committing step 3, with the checkpoint of 3 steps half written: the last holds 2
    assert [row["optimizer_step"] for row in killed] == [0, 1, 2, 2, 3, 4, 5]
    assert killed[2] == killed[3], "the repeated step differs from its first run"
    assert [*killed[:3], *killed[4:]] == straight
    expected, found = final_weights(folder, "straight"), final_weights(folder, "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.req("Q-11")
def test_when_rank_0_dies_the_other_leaves_and_names_it(folder: Path) -> None:
    reason = (folder / "reason-1.txt").read_text(encoding="utf-8")
    assert reason.startswith("DeadlinePassed: ")
    assert "rank 0 did not arrive within 3 s" in reason


@pytest.mark.req("Q-13", "M-11")
def test_a_segment_that_rank_1_cannot_train_leaves_the_step_of_both(folder: Path) -> None:
    assert [row["num_segments"] for row in rows_of(folder, "quarantined")] == [4, 5]
    told = (folder / "quarantined-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert told.count('["quarantine", 1]') == 1
    assert not (folder / "quarantined-1.jsonl").exists(), "rank 1 told the broker"


@pytest.mark.req("V-2", "V-6", "Q-10")
def test_rank_0_alone_tells_the_broker_in_the_right_order(folder: Path) -> None:
    told = [json.loads(line) for line in (folder / "told-0.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row for row in told if row[0] != "settle"] == [
        ["publish", 0],
        ["commit", 0],
        ["commit", 1],
        ["publish", 1],
        ["commit", 2],
        ["commit", 3],
        ["publish", 2],
        ["commit", 4],
        ["commit", 5],
        ["publish", 3],
    ]
    assert [row[1] for row in told if row[0] == "settle"] == [2, 4, 6]
    for done in (2, 4, 6):
        assert told.index(["settle", done]) > told.index(["commit", done - 1])
    assert not (folder / "told-1.jsonl").exists()
    versions = sorted(path.name for path in (folder / "straight" / "policy").iterdir())
    assert versions == ["v0", "v1", "v2", "v3"]


@pytest.mark.req("M-12", "M-13")
def test_rollout_counters_are_summed_over_ranks_and_absent_from_a_steps(folder: Path) -> None:
    for row in rows_of(folder, "straight"):
        rollout_keys = {key for key in row if key.startswith(("rollout/", "packing/"))}
        if row["kind"] == "A":
            assert rollout_keys == set()
            assert (row["loss_coord_prefix"], row["num_segments"]) == (0.0, 4)
        else:
            assert row["rollout/matched"] == 2 * 6
            assert row["rollout/dropped_wrong_arity"] == 6
            assert row["lag_claimed_max"] == row["policy_version"]
            assert row["packing/post_rollout_segments"] == 3


def test_a_stop_request_ends_all_ranks_with_a_checkpoint(folder: Path) -> None:
    checkpoint = latest_checkpoint(folder / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"


def test_a_published_policy_is_what_was_trained(folder: Path) -> None:
    published = weights_in(folder / "straight" / "policy" / "v3")
    trained = final_weights(folder, "straight")
    assert all(torch.equal(published[name], trained[name]) for name in trained)
    first = weights_in(folder / "straight" / "policy" / "v0")
    assert any(not np.array_equal(first[name].numpy(), trained[name].numpy()) for name in trained)
