"""`rollstream learn`: one rank under torchrun, or torchrun around all ranks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import ConfigError
from broker_schemas.method.evaluation_numbers import in_one_line
from configs import RunConfig, load_config
from learner.stop_request import StopRequest
from learner.train_loop import STOP_REQUESTED, LearnerOutcome
from rollstream.models.run_model import make_described_model
from rollstream.stack.learn_progress import closing_lines, opening_lines, step_progress
from rollstream.stack.tracker_process import tracking
from rollstream.watch.trackers import check_usable
from rollstream.wiring import access
from rollstream.wiring.access import needs_broker
from rollstream.wiring.identity import adopt_on_broker, settle_identity
from rollstream.wiring.package_paths import safe_environment
from rollstream.wiring.trainable import describe_untrainable, find_untrainable, write_untrainable

SIGNAL_BASE: Final = 128
log = logging.getLogger(__name__)


def learn_or_spawn(path: Path, overrides: Sequence[str]) -> int:
    """Return the exit status; under torchrun this process is one rank, else it starts all ranks and waits.

    128 + n after signal n, so that a script does not go on from half a run.
    """
    config = load_config(path, overrides)
    rank = os.environ.get("RANK")
    if rank is not None:
        return _run_here(config, int(rank))
    check_usable(config.tracking.to)
    make_described_model(config)
    leave_out_untrainable(config)
    prepare_run(config)
    _say(opening_lines(config))
    status = _spawn(config, path, overrides) if config.learner_world_size > 1 else _run_here(config, 0)
    if status == 0:
        _say(["learn: finished", *closing_lines(config, path)])
    elif status > SIGNAL_BASE:
        stopped = signal.Signals(status - SIGNAL_BASE).name
        _say([f"learn: stopped by {stopped}; the same command goes on from the last checkpoint"])
    return status


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _run_here(config: RunConfig, rank: int) -> int:
    """Run one rank in this process; return 0, or 128 + n where signal n ended the run early.

    All ranks have written by then: torchrun takes that status for a failure and ends those that are left.
    """
    access.log_to_stderr(config.run.name, "learn", rank)
    prepare_run(config)
    stop = StopRequest()
    if run_rank(config, stop, is_first=rank == 0).reason != STOP_REQUESTED:
        return 0
    # a rank that no signal reached ended for another rank's
    return SIGNAL_BASE + (stop.signal_number or signal.SIGTERM)


def leave_out_untrainable(config: RunConfig) -> None:
    """Refuse samples that cannot be trained, or write down and say which are left out [D-3]."""
    untrainable = find_untrainable(config)
    access.run_folder(config).path.mkdir(parents=True, exist_ok=True)
    write_untrainable(config, untrainable)
    _say(describe_untrainable(untrainable))


def prepare_run(config: RunConfig) -> None:
    """Make the run folder with the run's identity, or find that it goes on as it began; tell the broker.

    Raises ConfigError where it would have another past, or where the broker holds another run of its name.
    """
    access.run_folder(config).path.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        return
    identity = settle_identity(config)
    if needs_broker(config):
        broker = access.open_broker(config)
        try:
            adopt_on_broker(config, broker, identity)
        finally:
            broker.close()


def check_one_node(config: RunConfig) -> None:
    """Raise ConfigError where the ranks need more nodes than this one."""
    num_gpus, num_ranks = len(config.devices.learner_gpus), config.learner_world_size
    if num_gpus and num_ranks > num_gpus:
        raise ConfigError(
            f"devices.learner_world_size: got {num_ranks} ranks for {num_gpus} GPUs a node, "
            f"expected as many; start torchrun on each of {num_ranks // num_gpus} nodes, see docs/RUNBOOK.md"
        )


def _spawn(config: RunConfig, path: Path, overrides: Sequence[str]) -> int:
    check_one_node(config)
    command = [
        *(sys.executable, "-P", "-m", "rollstream.stack.learner_launcher"),
        *("--nproc_per_node", str(config.learner_world_size)),
        *("--master_addr", "127.0.0.1", "--master_port", "0", "--standalone"),
        *("-m", "rollstream.commands.program", "learn", str(path)),
        *(part for override in overrides for part in ("--set", override)),
    ]
    threads = str(max(1, config.training.num_threads))
    environment = {**safe_environment(), "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment)
    got: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        got.append(number)
        # Ctrl-C reached the ranks too, a container's stop this process alone: they finish their step, write
        # a checkpoint and end
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return SIGNAL_BASE + got[0] if got else status


def run_rank(config: RunConfig, stop: StopRequest, *, is_first: bool) -> LearnerOutcome:
    """Run this rank to its end; rank 0 evaluates and shows progress."""
    from rollstream.wiring.learn import run_learner_rank

    evaluate = _evaluation(config) if is_first else None
    on_step = step_progress(config) if is_first else None
    with tracking(config) if is_first else nullcontext():
        outcome = run_learner_rank(config, evaluate=evaluate, stop=stop, on_step=on_step)
    log.info("learner ended after %d optimizer steps: %s", outcome.optimizer_step, outcome.reason)
    return outcome


def _evaluation(config: RunConfig) -> Callable[[Any, int], dict[str, float]] | None:
    is_due = config.data.val_jsonl is not None and config.training.eval_every_steps > 0
    if not is_due or config.evaluates_in_stack:
        return None
    from rollstream.evaluation.evaluation import Evaluator

    evaluator = Evaluator(config)

    def evaluate(model: Any, optimizer_step: int) -> dict[str, float]:
        metrics = evaluator.evaluate(model).metrics
        log.info("evaluation after %d steps: %s", optimizer_step, in_one_line(metrics))
        return metrics

    return evaluate
