"""Checkpoints: whole directories that hold weights, optimizer, random state and place in the run.

The weights are an ordinary Hugging Face folder; everything else is
safetensors and JSON, so that loading one executes nothing.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from broker_schemas.errors import DataError, RunStopped
from broker_schemas.method import adapter_folder
from broker_schemas.method.adapters import AdapterPlan
from learner.checksums import verify_checksums, write_checksums
from learner.distributed import Ranks
from learner.sharding import like_part, local_part
from learner.trained_weights import TrainedWeights
from learner.whole_directory import copy_companions, keep_last, numbered_directories, whole_directory

PREFIX: Final = "checkpoint-"
FORMAT: Final = 1
_STATE_FILE: Final = "trainer_state.json"
_OPTIMIZER_FILE: Final = "optimizer.safetensors"
_RANDOM_FILE: Final = "random_state.safetensors"
SHARD_SIZE: Final = "4GB"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands. ``optimizer_step``: steps done, so the number of the next one.

    ``dataset_position``: ground-truth places passed. ``best_f1``, ``best_step`` (steps done then) and
    ``evaluations_since_best`` serve early stopping; -1 before the first evaluation. ``run_id``: whose
    checkpoint it is, empty where nobody said. ``recent_kinds``: A or B for each of the last steps.
    """

    optimizer_step: int
    policy_version: int = 0
    dataset_position: int = 0
    best_f1: float = -1.0
    best_step: int = -1
    evaluations_since_best: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    run_id: str = ""
    recent_kinds: str = ""


def write_checkpoint(
    parent: Path,
    *,
    trained: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    companions: Path,
    num_kept: int,
    ranks: Ranks,
) -> Path:
    """Write ``checkpoint-<optimizer_step>`` whole, then drop all but the best and the ``num_kept`` latest;
    return its path.

    All ranks call it and wait however long it takes; rank 0 writes the
    weights, every rank its part of a sharded optimizer.

    ``companions`` is the model folder whose tokenizer and processor files are copied.
    Raises RunStopped when the disk refuses; earlier checkpoints stay as they are.
    """
    final = parent / f"{PREFIX}{state.optimizer_step}"
    tensors = trained.whole_tensors(keep=ranks.is_first)
    mine = optimizer_tensors(trained, optimizer)
    part = parent / f".part-{final.name}-{ranks.rank}"
    if trained.is_sharded and not ranks.is_first:
        parent.mkdir(parents=True, exist_ok=True)
        save_file(mine, part)
    ranks.barrier(what=f"parts of {final.name}")

    def write() -> None:
        with whole_directory(final) as staging:
            try:
                save_weights(trained, staging, tensors)
                copy_companions(companions, staging)
                save_file(mine, staging / optimizer_file(0))
                save_file(_random_tensors(), staging / _RANDOM_FILE)
            except SafetensorError as exc:  # a full disk comes as the library's own error
                raise OSError(str(exc)) from exc
            if trained.is_sharded:
                for rank in range(1, ranks.world_size):
                    (parent / f".part-{final.name}-{rank}").replace(staging / optimizer_file(rank))
            body = {"format": FORMAT, **asdict(state)}
            (staging / _STATE_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
            write_checksums(staging)
        keep_last(parent, PREFIX, num_kept, also=state.best_step)

    ranks.wait_for_first(write, what=f"writing of {final.name}")
    return final


def optimizer_file(rank: int) -> str:
    """Return the name of one rank's part of the optimizer; rank 0's is all of it where nothing is sharded."""
    return _OPTIMIZER_FILE if rank == 0 else f"optimizer-{rank}.safetensors"


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
        if found != FORMAT:
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
    for name in ("optimizer_step", "policy_version", "dataset_position", "evaluations_since_best"):
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
    checkpoint: Path, trained: TrainedWeights, optimizer: torch.optim.Optimizer, rank: int = 0
) -> TrainerState:
    """Load weights, optimizer and random state into what is given; return the trainer state.

    Raises RunStopped naming the file and what does not fit.
    """
    state = read_trainer_state(checkpoint)
    verify_checksums(checkpoint)
    load_weights(checkpoint, trained)
    load_optimizer_tensors(
        _read_tensors(checkpoint / optimizer_file(rank if trained.is_sharded else 0)), trained, optimizer
    )
    random_state = _read_tensors(checkpoint / _RANDOM_FILE)
    torch.set_rng_state(random_state["cpu"])
    return state


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


def save_model_folder(
    model: Any, folder: Path, companions: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write weights, model config and the companion files of a Hugging Face folder into ``folder``."""
    save_model_weights(model, folder, dtype=dtype)
    copy_companions(companions, folder)


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


def load_weights(folder: Path, trained: TrainedWeights) -> None:
    """Load what ``save_weights`` wrote, to the bit; raises RunStopped."""
    tensors = _model_tensors(folder) if trained.adapter is None else _adapter_tensors(folder, trained.adapter)
    missing, unexpected = trained.load(tensors)
    if missing or unexpected:
        raise RunStopped(
            f"{folder}: weights of another model, missing {missing[:3]}, unexpected {unexpected[:3]}; "
            "give the model that the checkpoint was made with"
        )


def _model_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        kind = "an adapter" if adapter_folder.is_adapter(folder) else "no model*.safetensors"
        raise RunStopped(f"{folder}: got {kind}, expected the weights of a whole model")
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _read_tensors(path)
    return tensors


def _adapter_tensors(folder: Path, plan: AdapterPlan) -> dict[str, Tensor]:
    if not adapter_folder.is_adapter(folder):
        raise RunStopped(f"{folder}: got no {adapter_folder.CONFIG_FILE}, expected an adapter of this run")
    try:
        stored = adapter_folder.read_adapter(folder)
        adapter_folder.check_base(stored.plan.base, plan.base, folder)
    except DataError as exc:
        raise RunStopped(str(exc)) from exc
    return stored.tensors


def optimizer_tensors(trained: TrainedWeights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as ``<parameter
    name>/<entry>``, on the CPU; empty before its first step.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            # clone: AdamW's step counters may share storage, which safetensors refuses
            tensors[f"{name}/{entry}"] = (
                local_part(torch.as_tensor(value)).detach().cpu().clone().contiguous()
            )
    return tensors


def load_optimizer_tensors(
    tensors: dict[str, Tensor], trained: TrainedWeights, optimizer: torch.optim.Optimizer
) -> None:
    """Give ``optimizer`` the tensors of ``optimizer_tensors``; raises RunStopped for unknown parameters."""
    # fused kernels keep their step counters beside the weights
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in trained.parameters:
            raise RunStopped(
                f"optimizer state of {name}: the model trains no such parameter, expected the same model"
            )
        parameter = trained.parameters[name]
        device = torch.device("cpu") if entry == "step" and not is_fused else parameter.device
        moved = value.to(device)
        optimizer.state[parameter][entry] = moved if entry == "step" else like_part(moved, parameter)


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


def _random_tensors() -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()}
