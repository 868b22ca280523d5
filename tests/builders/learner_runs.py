"""Runs of the learner's loop on the tiny model and the fakes, small enough for a test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file

from broker_schemas.method.processor_file import ImageBounds
from learner.attention import choose_attention, use_attention
from learner.checkpoint_writing import CheckpointPlace, CheckpointWriter
from learner.checkpoints import PREFIX, TrainerState
from learner.companions import Companions
from learner.distributed import Ranks
from learner.metrics import LearnerMetrics
from learner.milestones import LearnerParts
from learner.packed_forward import position_rule_of
from learner.ports import PixelSource
from learner.settings import LearnerSettings
from learner.step_rows import RowSources
from learner.stop_request import StopRequest
from learner.train_loop import LearnerOutcome, run_learner
from learner.trained_weights import TrainedWeights
from learner.training_log import TrainingLog
from tests.builders.learner_fakes import FakeBroker, FakeGroundTruth, FakePixels
from tests.builders.learners import COLLATION, COORD_IDS, tiny_model
from tests.builders.settings import learner_settings, loss_settings, optimization_settings

NUM_STEPS = 6


def companions_of(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Companions:
    return Companions(folder=folder, bounds=ImageBounds(min_pixels=min_pixels, max_pixels=max_pixels))


def settings_for(folder: Path, name: str, **changes: Any) -> LearnerSettings:
    companions = folder / "companions"
    companions.mkdir(exist_ok=True)
    (companions / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    fields: dict[str, Any] = {
        "checkpoints_dir": folder / name / "checkpoints",
        "policy_dir": folder / name / "policy",
        "companions": companions_of(companions),
        "loss": loss_settings(coord_ids=COORD_IDS),
        "optimization": optimization_settings(learning_rate=1e-2, warmup_steps=2, max_steps=NUM_STEPS),
        "max_steps": NUM_STEPS,
        "b_ratio": "0.5",
        "row_capacity_tokens": 64,
        "sync_every_steps": 2,
        "save_every_steps": 2,
        "num_checkpoints_kept": 10,
        "num_policies_kept": 10,
        "stall_timeout_s": 60.0,
    }
    return learner_settings(**{**fields, **changes})


def run_one(
    ranks: Ranks,
    settings: LearnerSettings,
    broker: FakeBroker,
    *,
    pixels: PixelSource | None = None,
    is_cut_by_segment: bool = False,
    **parts: Any,
) -> LearnerOutcome:
    run_dir = settings.checkpoints_dir.parent
    run_dir.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed=3)
    if is_cut_by_segment:
        use_attention(model, choose_attention("segments", ranks.device, torch.float32))
    if not ranks.is_first:
        # one rank reads, the others receive
        model = model.to("meta")
    sources = RowSources(
        broker=broker,
        ground_truth=FakeGroundTruth(),
        pixels=pixels or FakePixels(),
        collation=COLLATION,
        positions_of=position_rule_of(model),
    )
    log = TrainingLog(run_dir / "train_log.jsonl") if ranks.is_first else None
    try:
        return run_learner(
            LearnerParts(
                model=model,
                ranks=ranks,
                sources=sources,
                metrics=LearnerMetrics(CollectorRegistry()),
                log=log,
                **{"stop": StopRequest(), **parts},
            ),
            settings,
        )
    finally:
        if log is not None:
            log.close()


def one_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, device=torch.device("cpu"), stall_timeout_s=60)


def write_checkpoint(
    parent: Path,
    *,
    trained: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    companions: Companions,
    num_kept: int,
    ranks: Ranks,
) -> Path:
    """Write a checkpoint, wait until it is durable, return its folder."""
    writer = CheckpointWriter(
        CheckpointPlace(parent=parent, companions=companions, num_kept=num_kept),
        trained=trained,
        optimizer=optimizer,
        ranks=ranks,
        clock=time.monotonic,
    )
    writer.start(state)
    writer.wait()
    return parent / f"{PREFIX}{state.optimizer_step}"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder, in however many files they are."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the training log without what the machine's speed and memory decide."""
    measured = ("tokens_per_s", "model_tflops_per_s", "model_flops_utilisation", "time_ms")
    return {
        key: value
        for key, value in row.items()
        if key not in measured and not key.endswith("_s") and not key.startswith("memory/")
    }
