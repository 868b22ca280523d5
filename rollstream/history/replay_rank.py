"""A rank of a replay, alone or under torchrun: ``python -m rollstream.history.replay_rank SPEC``."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from broker_schemas.errors import ConfigError, DataError, RollstreamError
from learner.determinism import fix_arithmetic
from learner.distributed import connect
from learner.stop_request import StopRequest
from learner.train_loop import LearnerOutcome, run_learner
from rollstream.history.replay import ReplaySpec
from rollstream.history.replay_plan import ArchivedClaims
from rollstream.wiring import access
from rollstream.wiring.learn import build_parts, rank_device

log = logging.getLogger(__name__)


def run_replay_rank(spec: ReplaySpec) -> LearnerOutcome:
    """Train this rank's share of the archived steps as the learner does, with nothing published.

    The learning rate follows the run's own course: only the end of the loop is moved.
    """
    config = spec.load()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    access.log_to_stderr(config.run.name, "replay", rank)
    device = rank_device(config, local_rank)
    fix_arithmetic(max(1, config.training.num_threads), is_cpu=device.type == "cpu")
    stop = StopRequest()
    stop.follow_signals()
    world_size = config.learner_world_size
    claims = ArchivedClaims(
        Path(spec.archive),
        world_size=world_size,
        capacity=config.training.global_max_length,
        packing_selector=spec.packing_selector,
    )
    ranks = connect(
        rank=rank,
        world_size=world_size,
        stall_timeout_s=config.stage2_async.stall_timeout_s,
        device=device,
    )
    try:
        parts, settings = build_parts(config, ranks, claims, stop, None, None)
        settings = replace(
            settings,
            max_steps=spec.end_step,
            save_every_steps=0,
            eval_every_steps=0,
            is_policy_published=False,
        )
        return run_learner(parts, settings)
    finally:
        ranks.close()


def main(arguments: list[str]) -> int:
    """Run the rank of the spec named in ``arguments``; return the exit status of the command line."""
    try:
        outcome = run_replay_rank(ReplaySpec.read(Path(arguments[0])))
    except RollstreamError as exc:
        sys.stderr.write(f"rollstream: {exc}\n")
        return 2 if isinstance(exc, ConfigError | DataError) else 3
    log.info("replay ended after %d optimizer steps: %s", outcome.optimizer_step, outcome.reason)
    return 0 if outcome.reason == "finished" else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
