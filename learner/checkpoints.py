"""Checkpoints: whole directories that hold weights, optimizer, random state and place in the run.

The weights are an ordinary Hugging Face folder; everything else is
safetensors and JSON, so that loading one executes nothing. How one is written is in ``checkpoint_writing``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from broker_schemas.errors import RunStopped
from broker_schemas.method import adapter_folder
from learner.checkpoint_contents import load_contents
from learner.checksums import verify_checksums
from learner.companions import Companions
from learner.tensor_files import write_tensor_file
from learner.trained_weights import TrainedWeights
from learner.whole_directory import numbered_directories

PREFIX: Final = "checkpoint-"
FORMAT: Final = 2
# 1: weights and optimizer in one file each, which are read like any other
READABLE_FORMATS: Final = (1, 2)
_STATE_FILE: Final = "trainer_state.json"
_RANDOM_FILE: Final = "random_state.safetensors"
SHARD_SIZE: Final = "4GB"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands. ``optimizer_step``: steps done, so the number of the next one.

    ``dataset_position``: ground-truth places passed. ``best_f1``, ``best_step`` (steps done then) and
    ``evaluations_since_best`` serve early stopping; -1 before the first evaluation. ``evaluated_step``:
    steps done at the last evaluation by others that was noted. ``run_id``: whose
    checkpoint it is, empty where nobody said. ``recent_kinds``: A or B for each of the last steps.
    """

    optimizer_step: int
    policy_version: int = 0
    dataset_position: int = 0
    best_f1: float = -1.0
    best_step: int = -1
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    run_id: str = ""
    recent_kinds: str = ""


def latest_checkpoint(parent: Path) -> Path | None:
    """Return the checkpoint with the highest optimizer step, None
    without one; half-written ones do not count.
    """
    found = [path for _, path in numbered_directories(parent, PREFIX) if (path / _STATE_FILE).is_file()]
    return found[-1] if found else None


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Return the state in ``checkpoint``; raises RunStopped for one that is broken or of a later format."""
    path = checkpoint / _STATE_FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict):
            raise TypeError(f"got {type(body).__name__}, expected a map")
        found = body.pop("format")
        if found not in READABLE_FORMATS:
            raise RunStopped(
                f"{path}: got format {found}, expected {FORMAT}; use the rollstream that wrote it"
            )
        state = TrainerState(**body)
        _check_values(state, checkpoint)
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise RunStopped(
            f"{path}: not a trainer state ({exc}); remove this checkpoint to resume from the one before"
        ) from exc


def _check_values(state: TrainerState, checkpoint: Path) -> None:
    """Raise ValueError naming the first value that no run could have."""
    for name in (
        "optimizer_step",
        "policy_version",
        "dataset_position",
        "evaluations_since_best",
        "evaluated_step",
    ):
        value = getattr(state, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of 0 or more")
    totals = state.totals.items() if isinstance(state.totals, dict) else [("totals", None)]
    for name, value in (("best_f1", state.best_f1), *totals):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}: got {value!r}, expected a finite number")
    if not isinstance(state.run_id, str):
        raise ValueError(f"run_id: got {state.run_id!r}, expected text")
    if checkpoint.name.startswith(PREFIX) and checkpoint.name != f"{PREFIX}{state.optimizer_step}":
        raise ValueError(f"optimizer_step: got {state.optimizer_step} in {checkpoint.name}")


def restore_checkpoint(
    checkpoint: Path,
    trained: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainerState:
    """Load this rank's part of weights and optimizer, and the random state; return the trainer state.

    The files are shared out over the ranks to be checked: all must succeed before any of them trains.
    Raises RunStopped naming the file and what does not fit.
    """
    state = read_trainer_state(checkpoint)
    verify_checksums(checkpoint, rank=rank, world_size=world_size)
    load_contents(checkpoint, trained, optimizer)
    random_state = _read_tensors(checkpoint / _RANDOM_FILE)
    torch.set_rng_state(random_state["cpu"])
    return state


def write_model_config(model: Any, staging: Path) -> None:
    """Write the description of a model whose weights are written apart."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(staging)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(staging)


def save_weights(
    trained: TrainedWeights,
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what is trained into ``folder``: a model's weights and config, or an adapter that names its base.

    ``tensors`` and ``dtype`` as for ``save_model_weights``.
    """
    if trained.adapter is None:
        save_model_weights(trained.model, folder, tensors=tensors, dtype=dtype)
        return
    kept = trained.tensors() if tensors is None else tensors
    adapter_folder.write_adapter(folder, trained.adapter, kept if dtype is None else _in_format(kept, dtype))


def write_small_files(
    staging: Path, state: TrainerState, companions: Companions, random_state: Tensor
) -> None:
    """Write what belongs to no rank: the companions of the weights and where the run stands."""
    companions.copy_to(staging)
    write_tensor_file(staging / _RANDOM_FILE, {"cpu": random_state})
    body = {"format": FORMAT, **asdict(state)}
    (staging / _STATE_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def save_model_folder(
    model: Any, folder: Path, companions: Companions, *, dtype: torch.dtype | None = None
) -> None:
    """Write weights, model config and the companion files of a Hugging Face folder into ``folder``."""
    save_model_weights(model, folder, dtype=dtype)
    companions.copy_to(folder)


def save_model_weights(
    model: Any,
    folder: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and model config of a Hugging Face folder into ``folder``.

    ``tensors`` are the weights, None those of ``model``; ``dtype`` turns floating ones into that format.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tensors = dict(model.state_dict() if tensors is None else tensors)
    if dtype is not None:
        tensors = _in_format(tensors, dtype)
    # it empties the dictionary that it is given
    model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=SHARD_SIZE)
    _note_dtype(folder / "config.json", tensors)


def _in_format(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in ``dtype``; what was one tensor under two names stays one."""
    turned: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.data_ptr() not in turned:
            turned[tensor.data_ptr()] = tensor.to(dtype)
    return {
        name: turned[tensor.data_ptr()] if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _note_dtype(config_file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Say in the folder's config which format its widest weights have."""
    widest = max((t.dtype for t in tensors.values() if t.is_floating_point()), key=lambda d: d.itemsize)
    name = str(widest).removeprefix("torch.")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for section in (config, *(part for part in config.values() if isinstance(part, dict))):
        if "dtype" in section:
            section["dtype"] = name
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as exc:
        raise RunStopped(
            f"{path}: cannot be read ({exc}); remove this checkpoint to resume from the one before"
        ) from exc
