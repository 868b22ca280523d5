"""Every trainer variant from its shipped YAML: the real stack, two ranks, at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_schemas.records.ledger import StepHistory
from rollstream.run_folder import read_json_lines
from tests.e2e.conftest import Program, ledger_of

pytestmark = [pytest.mark.timeout(420), pytest.mark.slow]
SMALL_STEP = ("training.effective_batch_size=8", "training.per_device_train_batch_size=2")


@pytest.mark.req("Q-1", "Q-7", "Q-8", "Q-14", "O-2", "M-2")
def test_stage2_async_trains_from_the_queue_and_balances(program: Program) -> None:
    folder = program.up("stage2_async/local.yaml", "async", *SMALL_STEP, steps=12)
    audit = program.audit(folder)
    assert audit["balanced"]
    assert sum(audit["steps"].values()) == 12
    assert audit["steps"]["B"] >= 1
    assert audit["trained"] > 0
    ledger = ledger_of(folder)
    for step in ledger.steps.values():
        if step.kind == "B":
            packs_of_ranks = [sum(rank == r for rank, *_ in step.packs) for r in (0, 1)]
            assert packs_of_ranks == [2, 2]
            last = step
    _look_at_it(program, folder.path, last)


@pytest.mark.req("Q-7", "S-1")
def test_where_every_step_is_scheduled_b_a_short_queue_still_makes_it_a_ground_truth_step(
    program: Program,
) -> None:
    # nothing is ready when the first step is decided
    folder = program.up(
        "stage2_async/local.yaml", "all-b", *SMALL_STEP, "stage2_ab.schedule.b_ratio=1", steps=12
    )
    audit = program.audit(folder)
    assert audit["balanced"]
    first, *_ = sorted(ledger_of(folder).steps.values(), key=lambda step: step.optimizer_step)
    assert (first.kind, first.reason) == ("A", "queue_short")


def _look_at_it(program: Program, run: Path, step: StepHistory) -> None:
    """The commands that show a run find what the log says."""
    record_id = step.packs[0][3][0]
    shown = program.run("audit", str(run), "--step", str(step.optimizer_step))
    assert record_id in shown.stdout
    picture = program.workdir / "rollout.png"
    inspected = program.run("inspect", str(run), record_id, "--picture", str(picture))
    assert inspected.returncode == 0, inspected.stderr
    assert "training sequence" in inspected.stdout
    assert picture.stat().st_size > 0
    assert program.run("top", str(run), "--once").returncode == 0
    assert program.run("report", str(run)).returncode == 0
    assert "</html>" in (run / "report.html").read_text()


@pytest.mark.req("P-8", "P-5")
def test_micro_scope_trains_one_pack_a_micro_step_and_carries_the_rest(program: Program) -> None:
    folder = program.up("rollout_matching/micro.yaml", "micro", *SMALL_STEP, steps=3)
    audit = program.audit(folder)
    assert audit["balanced"]
    assert audit["steps"] == {"A": 0, "B": 3}
    ledger = ledger_of(folder)
    assert all(len(step.packs) == 4 for step in ledger.steps.values())
    waiting = [item for item in ledger.rollouts.values() if item.stage == "matched"]
    assert audit["trained"] + len(waiting) == 24


@pytest.mark.req("P-6", "P-8")
def test_window_scope_trains_every_segment_in_its_own_step(program: Program) -> None:
    folder = program.up("rollout_matching/window.yaml", "window", *SMALL_STEP, steps=3)
    assert program.audit(folder)["balanced"]
    trained = [item for item in ledger_of(folder).rollouts.values() if item.stage == "trained"]
    assert len(trained) == 24
    assert all(item.optimizer_step == item.asked_for_step for item in trained)


@pytest.mark.req("S-7", "S-2")
def test_step_budget_trains_exactly_its_raw_rollouts_in_any_number_of_packs(program: Program) -> None:
    folder = program.up(
        "stage2_ab/step_budgeted.yaml",
        "budget",
        *SMALL_STEP,
        "training.global_max_length=256",
        "stage2_ab.schedule.b_ratio=0.5",
        steps=4,
    )
    audit = program.audit(folder)
    assert audit["balanced"]
    assert audit["steps"] == {"A": 2, "B": 2}
    ledger = ledger_of(folder)
    for step in ledger.steps.values():
        if step.kind == "B":
            names = [name for *_, record_ids in step.packs for name in record_ids]
            assert len(names) == 8
            assert {ledger.rollouts[name].asked_for_step for name in names} == {step.optimizer_step}
            assert len(step.packs) > 2
    rows = read_json_lines(folder.train_log)
    assert [row["kind"] for row in rows] == ["A", "B", "A", "B"]
