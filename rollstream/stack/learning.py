"""`rollstream learn`: one rank under torchrun, or torchrun around all ranks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config, show
from rollstream.models.run_model import make_described_model
from rollstream.wiring import access
from rollstream.wiring.trainable import describe_untrainable, find_untrainable, write_untrainable

log = logging.getLogger(__name__)


def learn_or_spawn(path: Path, overrides: Sequence[str]) -> int:
    """Return the exit status; under torchrun this process is one rank, else it starts all ranks and waits."""
    config = load_config(path, overrides)
    rank = os.environ.get("RANK")
    if rank is None:
        make_described_model(config)
        leave_out_untrainable(config)
    if rank is None and config.learner_world_size > 1:
        return _spawn(config, path, overrides)
    access.log_to_stderr(config.run.name, "learn", int(rank or 0))
    prepare_run(config)
    run_rank(config, is_first=int(rank or 0) == 0)
    return 0


def leave_out_untrainable(config: RunConfig) -> None:
    """Refuse samples that cannot be trained, or write down and say which are left out [D-3]."""
    untrainable = find_untrainable(config)
    access.run_folder(config).path.mkdir(parents=True, exist_ok=True)
    write_untrainable(config, untrainable)
    for line in describe_untrainable(untrainable):
        sys.stderr.write(f"{line}\n")


def prepare_run(config: RunConfig) -> None:
    """Make the run folder with its resolved configuration, once."""
    folder = access.run_folder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        return
    if not folder.resolved_config.exists():
        folder.resolved_config.write_text(show.resolved_yaml(config), encoding="utf-8")


def _spawn(config: RunConfig, path: Path, overrides: Sequence[str]) -> int:
    command = [
        *(sys.executable, "-m", "rollstream.stack.learner_launcher"),
        *("--nproc_per_node", str(config.learner_world_size)),
        *("--master_addr", "127.0.0.1", "--master_port", "0", "--standalone"),
        *("-m", "rollstream.commands.program", "learn", str(path)),
        *(part for override in overrides for part in ("--set", override)),
    ]
    threads = str(max(1, config.training.num_threads))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment)
    # a container's stop reaches this process alone: the ranks then finish their step and write a checkpoint
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        # the ranks had the same signal: they finish their step, write a checkpoint and end
        process.wait()
        return 130


def run_rank(config: RunConfig, *, is_first: bool) -> None:
    """Run this rank to its end; rank 0 evaluates and shows progress."""
    from rollstream.wiring.learn import run_learner_rank

    evaluate = _evaluation(config) if is_first else None
    outcome = run_learner_rank(config, evaluate=evaluate, on_step=_progress(config) if is_first else None)
    log.info("learner ended after %d optimizer steps: %s", outcome.optimizer_step, outcome.reason)


def _evaluation(config: RunConfig) -> Callable[[Any, int], dict[str, float]] | None:
    if config.data.val_jsonl is None or config.training.eval_every_steps == 0:
        return None
    from rollstream.evaluation.evaluation import Evaluator

    evaluator = Evaluator(config)

    def evaluate(model: Any, optimizer_step: int) -> dict[str, float]:
        metrics = evaluator.evaluate(model).metrics
        log.info("evaluation after %d steps: F1 %.3f", optimizer_step, metrics["eval_rollout_f1"])
        return metrics

    return evaluate


def _progress(config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Return what shows a step: a progress bar on a terminal, else a line now and then."""
    total = config.training.max_steps
    if sys.stderr.isatty():
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

        def show_bar(row: dict[str, Any]) -> None:
            done = int(row["optimizer_step"]) + 1
            f1 = f" F1 {row['eval_rollout_f1']:.3f}" if "eval_rollout_f1" in row else ""
            bar.update(task, completed=done, description=f"{row['kind']} loss {row['loss']:.3f}{f1}")
            if done >= total:
                bar.stop()

        return show_bar

    def show_line(row: dict[str, Any]) -> None:
        done = int(row["optimizer_step"]) + 1
        if done % 10 == 0 or done == total or row["kind"] == "B":
            log.info(
                "step %d/%d %s (%s) loss %.4f", done, total, row["kind"], row["reason"], float(row["loss"])
            )

    return show_line
