"""Trackers: what they receive, that nothing is sent twice, and that none of their failures reaches a run."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker_schemas.errors import ConfigError
from rollstream.commands.program import app
from rollstream.run_folder import RunFolder, read_json_map
from rollstream.stack.tracker_process import tracking
from rollstream.watch.trackers import Numbers, TrackedRun
from rollstream.watch.tracking import Follower, RunNumbers, track_until
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.run_folders import make_run_folder, make_sample, make_step, write_json_lines

EVALUATION = {"optimizer_step": 19, "eval_rollout_f1": 0.5, "eval_rollout_map": 0.25}


class RecordingTracker:
    def __init__(self) -> None:
        self.rows: list[tuple[int, int, Numbers]] = []
        self.is_failing = False
        self.is_closed = False

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        if self.is_failing:
            raise OSError("the server is away")
        self.rows += rows

    def close(self) -> None:
        self.is_closed = True


class HangingTracker(RecordingTracker):
    def __init__(self, released: threading.Event) -> None:
        super().__init__()
        self._released = released

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        self._released.wait()


def follower_of(folder: RunFolder, tracker: RecordingTracker) -> Follower:
    folder.tracking_dir.mkdir(exist_ok=True)
    run = TrackedRun(name="a", run_id="id-1", project="p", folder=folder.tracking_dir, settings={})
    return Follower("recorded", folder, run, open=lambda kind, given: tracker)


@pytest.mark.req("U-4")
def test_steps_evaluations_and_queue_are_sent_once_and_what_is_new_later(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path, num_steps=20, num_samples=41)
    write_json_lines(folder.evaluation_log, [EVALUATION])
    first, second = RecordingTracker(), RecordingTracker()
    assert follower_of(folder, first).finish()
    with folder.train_log.open("a") as lines:
        lines.write(json.dumps(make_step(20, loss=float("nan"))) + "\n" + '{"optimizer_step": 21, "lo')
    assert follower_of(folder, second).finish()

    losses = [(step, numbers["train/loss"]) for step, _, numbers in first.rows if "train/loss" in numbers]
    assert [step for step, _ in losses] == list(range(20))
    assert (19, {"eval/f1": 0.5, "eval/map": 0.25}) in [(step, numbers) for step, _, numbers in first.rows]
    assert any(numbers.get("eval-after/f1") == 0.784 for _, _, numbers in first.rows)
    queue = [numbers for _, _, numbers in first.rows if "queue/ready_depth_0" in numbers]
    assert len(queue) == 5, "one sample in ten seconds"
    assert {"queue/ready_depth_1", "queue/dropped", "queue/in_flight"} <= set(queue[0])
    assert [step for step, _, _ in second.rows] == [20]
    assert "train/loss" not in second.rows[0][2], "no number is made of one that is none"
    assert first.is_closed
    assert second.is_closed


@pytest.mark.req("U-4")
def test_a_tracker_that_fails_is_said_once_and_gets_everything_when_it_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run_folder(tmp_path, num_steps=3, num_samples=1)
    tracker = RecordingTracker()
    tracker.is_failing = True
    follower = follower_of(folder, tracker)
    assert not follower.step()
    assert not follower.step()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the server is away" in caplog.text
    assert read_json_map(folder.tracking_state("recorded")) is None

    tracker.is_failing = False
    assert follower.step()
    assert [step for step, _, numbers in tracker.rows if "train/loss" in numbers] == [0, 1, 2]


@pytest.mark.req("U-4")
def test_a_tracker_that_hangs_holds_up_neither_the_others_nor_the_end(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path, num_steps=3, num_samples=1)
    released, ended, sound = threading.Event(), threading.Event(), RecordingTracker()
    followers = [follower_of(folder, HangingTracker(released)), follower_of(folder, sound)]
    followers[1].kind = "sound"
    ended.set()
    started = time.monotonic()
    try:
        assert not track_until(followers, ended, deadline_s=0.5)
    finally:
        released.set()
    assert time.monotonic() - started < 5
    assert sound.is_closed
    assert sound.rows


@pytest.mark.req("U-4")
def test_a_log_that_was_replaced_by_a_shorter_one_is_read_from_its_start(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path, num_steps=9, num_samples=1)
    numbers = RunNumbers(folder, {})
    numbers.new_rows()
    write_json_lines(folder.train_log, [make_step(0)])
    write_json_lines(folder.stack_samples, [make_sample(40)])
    rows = RunNumbers(folder, numbers.state).new_rows()
    assert [step for step, _, found in rows if "train/loss" in found] == [0]


@pytest.mark.req("U-4")
def test_tensorboard_shows_training_evaluation_and_queue(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_run_folder(tmp_path, num_steps=6, num_samples=12)
    write_json_lines(folder.evaluation_log, [EVALUATION])
    with folder.train_log.open("a") as lines:  # as after a kill: resumed from step 4
        lines.write("".join(json.dumps(make_step(step, loss=9.0)) + "\n" for step in (4, 5)))
    done = CliRunner().invoke(app, ["track", str(folder.path), "--to", "tensorboard"])
    assert done.exit_code == 0, done.output
    events = EventAccumulator(str(folder.tensorboard_dir))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("train/loss")][-2:] == [9.0, 9.0]
    assert [(event.step, event.value) for event in events.Scalars("eval/f1")] == [(19, 0.5)]
    assert events.Scalars("queue/ready_depth_0")


@pytest.mark.req("U-4")
@pytest.mark.parametrize(
    "words, said",
    [
        ([], "no tracker is named"),
        (["--to", "comet"], "expected one of mlflow, tensorboard, wandb"),
        (["--to", "mlflow"], "pip install 'rollstream[mlflow]'"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = make_run_folder(tmp_path, num_steps=1, num_samples=1)
    done = CliRunner().invoke(app, ["track", str(folder.path), *words])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)


@pytest.mark.req("U-4")
def test_a_run_goes_on_where_its_tracker_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run_folder(tmp_path, num_steps=2, num_samples=1)
    package = tmp_path / "path" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('broken to the core')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    mapping: dict[str, Any] = make_mapping(tracking__to=["wandb"], tracking__project="mine")
    mapping["run"] = {"name": folder.name, "output_dir": str(tmp_path)}
    config = load_mapping(tmp_path, mapping)
    log = folder.role_log("track", 0)
    with tracking(config):
        give_up_at = time.monotonic() + 30
        while time.monotonic() < give_up_at and not (
            log.exists() and "broken to the core" in log.read_text()
        ):
            time.sleep(0.05)
    assert "the run goes on: SystemError: broken to the core" in log.read_text()
    assert sys.exc_info() == (None, None, None)
