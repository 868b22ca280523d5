"""The processes of the torture: roles with their real wiring, producers without a model, library ranks."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.lease import holding
from broker_schemas.broker.policy import PublishedPolicy, publish_policy
from broker_schemas.client import PackFeed, PushStatus, SegmentSink
from broker_schemas.errors import (
    BodyMissing,
    BrokerError,
    ConfigError,
    PlaceTaken,
    RollstreamError,
    RunStopped,
)
from broker_schemas.method.dataset import Sample
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import END_TOKEN
from configs import RunConfig
from producers.rollout_backend import Generation
from rollstream.history.keep_archive import run_archive
from rollstream.wiring import access, produce
from rollstream.wiring.dispatch import run_dispatcher
from rollstream.wiring.match import run_matcher
from rollstream.wiring.pack import run_packer

FINGERPRINT: Final = "torture"
GENERATION_S: Final = 0.05
CHECKPOINT_EVERY: Final = 8
MOST_APART: Final = 8
# how a role leaves that says why; any other way is a fault
LEAVINGS: Final[dict[type[RollstreamError], int]] = {
    PlaceTaken: 40,
    ConfigError: 41,
    RunStopped: 42,
    BrokerError: 43,
    BodyMissing: 44,
}
LEAVING_NAMES: Final = {
    0: "was told to stop",
    40: "its place was taken",
    41: "its place is held",
    42: "the run must stop",
    43: "no broker",
    44: "a payload is gone",
}


class ScriptedBackend:
    """Writes the ground truth, mostly; some rollouts are cut short and some are noise."""

    def __init__(self, config: RunConfig) -> None:
        folder = access.model_dir(config)
        bounds = config.model.image
        self._prompts = access.prompt_builder(config, folder)
        self._grid = ImageGrid.of_model(folder, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
        self.policy_version = -1
        self.processor_fingerprint = FINGERPRINT

    def follow(self, policy: PublishedPolicy) -> None:
        self.policy_version = policy.policy_version

    def generate(self, samples: Sequence[Sample], seeds: Sequence[int], **_: Any) -> list[Generation]:
        time.sleep(GENERATION_S)
        return [
            self._generate(sample, random.Random(seed)) for sample, seed in zip(samples, seeds, strict=True)
        ]

    def _generate(self, sample: Sample, rng: random.Random) -> Generation:
        grid = self._grid.grid(sample.width, sample.height)
        text = render_payload(sample.objects).text + END_TOKEN
        tokens = self._prompts.tokenizer.encode(text, add_special_tokens=False).ids
        fate = rng.random()
        if fate < 0.1:
            tokens = tokens[: rng.randint(1, len(tokens))]
        elif fate < 0.15:
            tokens = [rng.randrange(self._prompts.tokenizer.get_vocab_size()) for _ in tokens]
        return Generation(
            prompt_token_ids=self._prompts.build_ids([grid]),
            response_token_ids=np.asarray(tokens, dtype=np.int32),
            response_logprobs=np.zeros(len(tokens), dtype=np.float32),
            grids_thw=(grid,),
            finish_reason="length" if fate < 0.1 else "stop",
            policy_version=self.policy_version,
        )

    def close(self) -> None:
        return


class NotingSink(SegmentSink):
    """Notes each rollout that the broker said it has."""

    notes: Path

    def _send(self, arguments: Any, bodies: Any, num: int) -> list[PushStatus]:
        statuses = super()._send(arguments, bodies, num)
        names = [str(line).partition("\t")[0] for line in arguments[4:]]
        with self.notes.open("a") as file:
            file.writelines(
                f"{name}\n"
                for name, status in zip(names, statuses, strict=True)
                if status in ("ok", "duplicate")
            )
        return statuses


def run_producer(config: RunConfig, index: int, folder: Path) -> None:
    """Run the real producer around a backend that needs no model."""
    NotingSink.notes = folder / f"taken-{index}-{os.getpid()}"
    vars(produce)["SegmentSink"] = NotingSink
    vars(produce)["rollout_backend"] = lambda config, *_: ScriptedBackend(config)
    produce.run_producer(config, index)


def run_rank(config: RunConfig, rank: int, folder: Path) -> None:
    """Train steps from the last checkpoint on; rank 0 holds the place, commits, settles, publishes."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    if rank > 0:
        train(config, broker, rank, folder, stop.is_set)
        return
    with holding(broker, "learner", on_loss=stop.set) as (held, _):
        train(config, held, rank, folder, stop.is_set)


def train(
    config: RunConfig, broker: Broker, rank: int, folder: Path, is_stopping: Callable[[], bool]
) -> None:
    step = read_number(folder / f"checkpoint-{rank}")
    feed = PackFeed(
        broker,
        world_size=config.learner_world_size,
        rank=rank,
        packs_per_step=config.gradient_accumulation_steps,
        first_optimizer_step=step,
        version_window=config.stage2_async.version_window,
        archived_only=True,
        deadline_s=3600,
    )
    others = [folder / f"at-{other}" for other in range(config.learner_world_size) if other != rank]
    if rank == 0:
        publish(config, broker, step)
    with (folder / f"trained-{rank}").open("a", buffering=1) as notes:
        while not is_stopping():
            write_number(folder / f"at-{rank}", step)
            if step > min(map(read_number, others), default=step) + MOST_APART:
                time.sleep(0.05)
                continue
            packs = feed.next_step()
            notes.write(f"{step}\t{' '.join(name for pack, _ in packs for name in pack.record_ids)}\n")
            step += 1
            if rank == 0:
                feed.commit({"loss": 1.0})
            if step % CHECKPOINT_EVERY == 0:
                write_number(folder / f"checkpoint-{rank}", step)
            if rank == 0 and step % CHECKPOINT_EVERY == 0:
                covered = [read_number(path) for path in folder.glob("checkpoint-?")]
                feed.settle(min(covered) if len(covered) == config.learner_world_size else 0)
            if rank == 0 and step % config.stage2_async.sync_every_steps == 0:
                publish(config, broker, step)


def publish(config: RunConfig, broker: Broker, step: int) -> None:
    """Make the policy of a step current, however often the broker is away meanwhile."""
    version = step // config.stage2_async.sync_every_steps
    while True:
        try:
            publish_policy(broker, policy_version=version, optimizer_step=step, weights_path="w")
            return
        except BrokerError:
            time.sleep(0.1)


def read_number(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def write_number(path: Path, number: int) -> None:
    new = path.with_suffix(".new")
    new.write_text(str(number))
    new.replace(path)


def run_role(name: str, config: RunConfig, folder: Path) -> None:
    """Run one role until a signal; the process ends with a status of `LEAVINGS` where it says why."""
    log = os.open(folder / "roles.log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    role, _, index = name.partition("-")
    access.log_to_stderr(config.run.name, role, int(index or 0))
    roles: dict[str, Callable[[RunConfig, int], object]] = {
        "dispatch": run_dispatcher,
        "produce": partial(run_producer, folder=folder),
        "match": run_matcher,
        "pack": run_packer,
        "archive": run_archive,
        "learn": partial(run_rank, folder=folder),
    }
    try:
        roles[role](config, int(index or 0))
    except RollstreamError as exc:
        logging.getLogger("torture").error("left: %s: %s", type(exc).__name__, exc)
        sys.exit(next((status for kind, status in LEAVINGS.items() if isinstance(exc, kind)), 1))
