"""Killed at random, nothing is lost, nothing is trained twice, and the result is that of an unbroken run."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import pytest

from rollstream.run_folder import RunFolder
from tests.e2e.conftest import Program, last_lines, ledger_of
from tests.e2e.killing import LEARNER_TARGETS, PIPELINE_TARGETS, KilledStack

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]
NUM_KILLS = 20
CHANGES = (
    "training.effective_batch_size=8",
    "training.per_device_train_batch_size=2",
    "training.save_every_steps=3",
    "stage2_async.sync_every_steps=2",
    "stage2_async.stall_timeout_s=60",
    "producers.lease_s=5",
    "broker.durability=always",
    "custom.extra.rollout_matching.max_new_tokens=32",
)


def rows_by_step(folder: RunFolder) -> dict[int, list[dict[str, Any]]]:
    """Return every row that was ever logged for a step: more than one where it was repeated after a kill."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in folder.train_log.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a rank was killed while it wrote
        rows[row["optimizer_step"]].append(row)
    return rows


@pytest.mark.req("Q-10", "Q-4", "Q-8", "Q-14", "Q-15")
def test_a_run_killed_twenty_times_equals_the_unbroken_replay_of_its_own_log(program: Program) -> None:
    chance = random.Random(20261121)
    folder = RunFolder(program.workdir / "runs" / "killed")
    arguments = (
        "configs/stage2_async/local.yaml",
        *("--steps", "60"),
        *program.overrides("run.name=killed", *CHANGES),
    )
    stack = KilledStack(program, folder, arguments, chance)
    stack.start()
    stack.wait_for_steps(2)
    # a whole stack in between: five deaths of a role within a minute of health would end the stack
    targets = [
        *(LEARNER_TARGETS[i % 3] for i in range(12)),
        *(chance.choice(PIPELINE_TARGETS) for _ in range(NUM_KILLS - 12)),
    ]
    order = [target for pair in zip(targets[:8], targets[12:], strict=True) for target in pair] + targets[
        8:12
    ]
    for target in order:
        stack.wait_for_steps(chance.choice((0, 1, 2)))
        if stack.is_done:
            break
        stack.kill(target)
        if target in LEARNER_TARGETS:
            stack.wait_for_steps(1)
    stack.wait_for_end()
    assert stack.exit_status == 0, f"{stack.killed}\n{last_lines(folder)}"
    assert len(stack.killed) >= NUM_KILLS, stack.killed

    assert program.audit(folder)["balanced"]
    ledger = ledger_of(folder)
    trained = [name for step in ledger.steps.values() for *_, names in step.packs for name in names]
    assert len(trained) == len(set(trained))
    rows = rows_by_step(folder)
    assert sorted(rows) == list(range(60))
    repeated = {step: found for step, found in rows.items() if len(found) > 1}
    assert repeated, "no step was repeated: the kills came too late to prove anything"
    for found in repeated.values():
        assert len({(row["loss"], row["kind"], row["num_segments"], row["grad_norm"]) for row in found}) == 1

    replayed = program.run("replay", str(folder.path), "--json", timeout_s=600)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    report = json.loads(replayed.stdout)
    assert report["is_equal"]
    assert report["weights_equal"]
