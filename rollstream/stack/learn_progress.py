"""What `rollstream learn` shows: what it loads, then steps with an estimate of the time that is left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from configs import RunConfig
from rollstream.wiring import access
from rollstream.wiring.trainable import read_samples

LINE_EVERY_S: Final = 10.0
log = logging.getLogger(__name__)


def opening_lines(config: RunConfig) -> Iterator[str]:
    """Yield what a run is about to load, and where it writes."""
    folder = access.model_dir(config)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    yield f"model: {folder} ({size / 1e6:.0f} MB)"
    for key, path in (("train", config.data.train_jsonl), ("val", config.data.val_jsonl)):
        if path is not None:
            yield f"{key}: {len(read_samples(config, path))} samples of {path}"
    run, training = access.run_folder(config), config.training
    ranks = "1 rank" if config.learner_world_size == 1 else f"{config.learner_world_size} ranks"
    yield f"run: {run.path}, {training.max_steps} steps of {training.effective_batch_size} samples, {ranks}"
    yield "loading the model; the first step takes longest"


def left_text(seconds: float) -> str:
    """Return a time that is left in words: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


class StepLines:
    """Says the first step at once, then one now and then, with what is left at the rate so far."""

    def __init__(self, num_steps: int, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self._num_steps = num_steps
        self._clock = clock
        self._say = say
        self._first: tuple[float, int] | None = None
        self._said_s = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        now, done = self._clock(), int(row["optimizer_step"]) + 1
        is_first = self._first is None
        if self._first is None:
            self._first = (now, done)
        is_due = is_first or done == self._num_steps or now - self._said_s >= LINE_EVERY_S
        if not is_due:
            return
        self._said_s = now
        left = self._left(now, done)
        text = f"step {done}/{self._num_steps} {row['kind']} ({row['reason']}) loss {float(row['loss']):.4f}"
        self._say(f"{text}, {left}" if left else text)

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        started, first = self._first
        if done <= first or done >= self._num_steps:
            return ""
        return left_text((now - started) / (done - first) * (self._num_steps - done))


def step_progress(config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Return what shows a step: a progress bar on a terminal, else a line now and then."""
    total = config.training.max_steps
    if not sys.stderr.isatty():
        return StepLines(total, time.monotonic, log.info)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("training", total=total)
    bar.start()

    def show(row: dict[str, Any]) -> None:
        done = int(row["optimizer_step"]) + 1
        bar.update(task, completed=done, description=f"{row['kind']} loss {row['loss']:.3f}")
        if done >= total:
            bar.stop()

    return show


def closing_lines(config: RunConfig, config_path: Path) -> Iterator[str]:
    """Yield where a run ended, what it left and what to do next."""
    from learner.checkpoints import latest_checkpoint

    run = access.run_folder(config)
    checkpoint = latest_checkpoint(run.checkpoints_dir)
    if checkpoint is not None:
        yield f"checkpoint: {checkpoint}"
    yield f"log: {run.train_log}"
    if config.data.val_jsonl is not None:
        yield f"next: rollstream eval {config_path}, then rollstream report {run.path}"
    else:
        yield f"next: rollstream report {run.path}; data.val_jsonl would let it be evaluated"
