"""A run keeps its past and its place: other values and a second learner are refused by name."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from rollstream.history.replay import replay_run
from rollstream.run_folder import RunFolder, latest_steps, read_json_lines
from tests.e2e.conftest import Program

pytestmark = [pytest.mark.timeout(600)]
SMALL = (
    "training.effective_batch_size=4",
    "training.per_device_train_batch_size=2",
    "training.eval_every_steps=0",
    "custom.extra.rollout_matching.max_new_tokens=24",
)
WARM = ("stage2_ab.schedule.b_ratio=0", "devices.learner_world_size=1", *SMALL)
CONFIG = "configs/stage2_async/local.yaml"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


def learn(program: Program, *changes: str, steps: int) -> subprocess.CompletedProcess[str]:
    arguments = program.overrides("run.name=one", f"training.max_steps={steps}", *WARM, *changes)
    return program.run("learn", CONFIG, *arguments)


@pytest.mark.req("Q-18")
def test_going_on_with_another_past_is_refused_and_a_longer_run_keeps_its_own(program: Program) -> None:
    """Given a run with a cosine schedule that is over, when it goes on with what may and may not change."""
    cosine = "training.lr_scheduler=cosine"
    folder = RunFolder(program.workdir / "runs" / "one")
    assert learn(program, cosine, steps=3).returncode == 0
    first = latest_steps(read_json_lines(folder.train_log))
    resolved = folder.resolved_config.read_text()
    other = program.scenes / "other.jsonl"
    other.write_text("".join((program.scenes / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))

    for change, says in (
        ("training.learning_rate=0.5", "training.learning_rate: began with"),
        ("run.seed=9", "run.seed: began with 17, got 9"),
        ("devices.learner_world_size=2", "devices.learner_world_size: began with 1, got 2"),
        (f"data.train_jsonl={other}", "data.train_jsonl (its contents)"),
        ("stage2_ab.schedule.b_ratio=0.5", "stage2_ab.schedule.b_ratio: began with"),
        ("custom.extra.rollout_matching.w1_weight=3", "w1_weight: began with"),
    ):
        refused = learn(program, cosine, f"data.root={program.scenes}", change, steps=6)
        assert refused.returncode == 2, refused.stderr[-2000:]
        assert says in refused.stderr, refused.stderr[-2000:]

    assert learn(program, cosine, steps=6).returncode == 0
    rows = latest_steps(read_json_lines(folder.train_log))
    assert [row["learning_rate"] for row in rows[:3]] == [row["learning_rate"] for row in first]
    assert rows[3]["learning_rate"] > rows[2]["learning_rate"]  # by the longer course from here on
    assert (folder.path / "resolved-1.yaml").read_text() == resolved
    changed = json.loads(folder.identity.read_text())["changed"]
    assert changed == [{"optimizer_step": 3, "changes": {"training.max_steps": ["3", "6"]}}]


@pytest.mark.req("Q-19")
def test_a_second_learner_in_one_folder_is_refused_and_told_who_is_there(
    program: Program, processes: list[subprocess.Popen[str]]
) -> None:
    arguments = program.overrides("run.name=one", "training.max_steps=400", *WARM)
    command = program.command("learn", CONFIG, *arguments)
    folder = RunFolder(program.workdir / "runs" / "one")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(first)
    while not folder.train_log.exists() or not folder.train_log.stat().st_size:
        assert first.poll() is None

    second = learn(program, steps=400)

    assert second.returncode == 2
    assert f"in use by another learner, process {first.pid}" in second.stderr


@pytest.mark.req("Q-18")
def test_a_run_made_longer_replays_with_the_values_in_force_at_each_step(program: Program) -> None:
    """Given a run with rollouts and a cosine schedule, ended and then made longer, when it is replayed."""
    changes = ("training.lr_scheduler=cosine", "stage2_async.stall_timeout_s=60", *SMALL)
    program.up("stage2_async/local.yaml", "longer", *changes, steps=3)
    folder = program.up("stage2_async/local.yaml", "longer", *changes, steps=6)

    assert program.audit(folder)["faults"] == []
    assert replay_run(folder.path).is_equal
