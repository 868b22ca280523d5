"""The broker dies under a running stack, again and again: it comes back with its log, and all go on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from rollstream.history.archive_loss import read_losses
from rollstream.run_folder import RunFolder, read_json_lines
from tests.e2e.conftest import Program, last_lines, ledger_of
from tests.e2e.killing import KilledStack, children_of

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
NUM_KILLS = 4
NUM_STEPS = 20


def broker_pid(stack: KilledStack) -> int:
    """Return the process of the embedded Redis, once it is there."""
    assert stack._process is not None
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at and not stack.is_done:
        for pid in children_of(stack._process.pid):
            # redis writes its address behind its own name
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if title.partition(b" ")[0].endswith(b"redis-server"):
                return pid
        time.sleep(0.05)
    raise AssertionError(f"no redis-server below the stack after {stack.killed}\n{last_lines(stack.folder)}")


@pytest.mark.req("Q-1", "Q-4", "Q-14", "Q-2")
@pytest.mark.parametrize("durability", ["always", "everysec"])
def test_a_broker_killed_under_a_running_stack_comes_back_and_the_run_ends_balanced(
    program: Program, durability: str
) -> None:
    chance, folder = random.Random(11), RunFolder(program.workdir / "runs" / durability)
    changes = (
        f"run.name={durability}",
        f"broker.durability={durability}",
        "training.effective_batch_size=4",
        "training.per_device_train_batch_size=2",
        "training.save_every_steps=5",
        "stage2_async.stall_timeout_s=60",
        "producers.lease_s=5",
        "custom.extra.rollout_matching.max_new_tokens=32",
    )
    arguments = ("configs/stage2_async/local.yaml", "--steps", str(NUM_STEPS), *program.overrides(*changes))
    stack = KilledStack(program, folder, arguments, chance)
    stack.start()
    stack.wait_for_steps(2)
    for _ in range(NUM_KILLS):
        os.kill(broker_pid(stack), signal.SIGKILL)
        stack.killed.append("broker")
        stack.wait_for_steps(chance.choice((2, 3)))
    stack.wait_for_end(timeout_s=200)

    said = (program.workdir / "up.log").read_text(errors="replace")
    assert stack.exit_status == 0, f"{said}\n{last_lines(folder)}"
    assert said.count("broker 0 died (signal 9)") == NUM_KILLS, said
    audit = program.audit(folder)
    assert audit["balanced"], audit
    # killed, not cut off from power: what was acknowledged is in the system's page cache, with everysec too
    assert (audit["undone"], read_losses(folder.archive_dir)) == ({}, [])
    ledger = ledger_of(folder)
    assert sorted(ledger.committed) == list(range(NUM_STEPS))
    trained = [name for step in ledger.steps.values() for *_, names in step.packs for name in names]
    assert trained
    assert len(trained) == len(set(trained))
    rows = read_json_lines(folder.train_log)
    assert [row["optimizer_step"] for row in rows] == list(range(NUM_STEPS)), "no step was taken twice"
