"""What a checkpoint holds of one rank, and how a rank takes its part back, whatever ranks wrote it.

Weights are whole tensors, so that the folder is an ordinary one, shared out over the ranks by bytes; the
optimizer's tensors stay as they are spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from broker_schemas.errors import DataError, RunStopped
from broker_schemas.method import adapter_folder
from broker_schemas.method.adapters import AdapterPlan
from learner.checkpoint_storage import (
    OPTIMIZER,
    WEIGHTS,
    Block,
    BlockReader,
    whole_block,
    with_one_process_expected,
)
from learner.sharding import block_of, like_part, local_part, whole
from learner.trained_weights import TrainedWeights

SHARD_BYTES: Final = 4_000_000_000
INDEX_FILE: Final = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class RankContents:
    """Copies of what one rank saves, on the CPU, by key, and where each goes.

    ``adapter``: on rank 0 the weights of an adapter, by their names in the model; they have a format of
    their own and are small.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: str, tensor: Tensor, block: Block) -> None:
        self.tensors[key] = _private_copy(tensor)
        self.blocks[key] = block


def copy_contents(
    trained: TrainedWeights, optimizer: torch.optim.Optimizer, *, rank: int, world_size: int
) -> RankContents:
    """Return this rank's share, copied, so that training may go on at once.

    Where the model is sharded every rank must call it: weights are put together for who writes them.
    """
    files = weight_files(trained, world_size)
    owner = weight_owners(files, world_size)
    if trained.adapter is not None:
        contents = RankContents(adapter=trained.whole_tensors(keep=rank == 0))
    else:
        contents = RankContents()
        for name, tensor in trained.untied_tensors().items():
            gathered = whole(tensor.detach())
            if owner[name] == rank:
                contents.add(f"{WEIGHTS}/{name}", gathered, whole_block(files[name], gathered))
    _add_optimizer(contents, trained, optimizer, owner, rank)
    return contents


def _add_optimizer(
    contents: RankContents,
    trained: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    owner: Mapping[str, int],
    rank: int,
) -> None:
    file = optimizer_file(rank)
    number = itertools.count()
    for name, parameter in trained.parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            key, tensor = f"{OPTIMIZER}/{name}/{entry}", torch.as_tensor(value)
            spread = block_of(tensor)
            if spread is None:
                if owner.get(name, 0) == rank:
                    contents.add(key, tensor, whole_block(file, tensor))
                continue
            # ranks that hold the same block write it in turn
            local = local_part(tensor)
            if local.numel() and next(number) % spread.num_copies == spread.copy:
                block = Block(file=file, whole_shape=tuple(tensor.shape), offsets=spread.offsets)
                contents.add(key, local, block)


def weight_files(trained: TrainedWeights, world_size: int) -> dict[str, str]:
    """Return the file of every weight: files of 4 GB at most, as many as ranks or more, filled in order."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in _shapes(trained).items()}
    total = sum(sizes.values())
    num_files = max(1, min(len(sizes), max(world_size, -(-total // SHARD_BYTES))))
    if num_files == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    numbers, passed = {}, 0
    for name, size in sizes.items():
        numbers[name] = min(int(passed * num_files / total), num_files - 1)
        passed += size
    used = {number: place for place, number in enumerate(sorted(set(numbers.values())), 1)}
    return {
        name: f"model-{used[number]:05d}-of-{len(used):05d}.safetensors" for name, number in numbers.items()
    }


def weight_owners(files: Mapping[str, str], world_size: int) -> dict[str, int]:
    """Return the rank that writes each weight; files go round."""
    place = {file: index % world_size for index, file in enumerate(sorted(set(files.values())))}
    return {name: place[file] for name, file in files.items()}


def weight_index(trained: TrainedWeights, world_size: int) -> dict[str, Any] | None:
    """Return what the index of several weight files says; None for one file."""
    files = weight_files(trained, world_size)
    if len(set(files.values())) < 2 or trained.adapter is not None:
        return None
    total = sum(tensor.numel() * tensor.element_size() for tensor in _shapes(trained).values())
    return {"metadata": {"total_size": total}, "weight_map": files}


def optimizer_file(rank: int) -> str:
    """Return the name of one rank's part of the optimizer."""
    return "optimizer.safetensors" if rank == 0 else f"optimizer-{rank}.safetensors"


def load_contents(checkpoint: Path, trained: TrainedWeights, optimizer: torch.optim.Optimizer) -> None:
    """Give weights and optimizer what ``checkpoint`` holds of this rank's part, each read in place.

    It need not have been written by as many ranks, or spread as here.
    Raises RunStopped naming what does not fit.
    """
    reader = BlockReader(checkpoint)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    if trained.adapter is not None:
        _load_adapter(checkpoint, trained, trained.adapter)
    else:
        state |= {f"{WEIGHTS}/{name}": t for name, t in trained.untied_tensors().items()}
        _check_names(checkpoint, state, metadata)
    state |= _optimizer_targets(metadata, trained, optimizer)
    try:
        with_one_process_expected()
        load(state, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    except CheckpointException as exc:
        error = next(iter(exc.failures.values()))[0]
        if isinstance(error, RunStopped):
            raise error from exc
        raise RunStopped(
            f"{checkpoint}: does not fit this model ({error}); give the model that it was made with"
        ) from exc
    for key, tensor in state.items():
        kind, _, rest = key.partition("/")
        if kind == OPTIMIZER:
            name, _, entry = rest.rpartition("/")
            optimizer.state[trained.parameters[name]][entry] = tensor
    trained.after_update()


def _load_adapter(checkpoint: Path, trained: TrainedWeights, plan: AdapterPlan) -> None:
    if not adapter_folder.is_adapter(checkpoint):
        raise RunStopped(
            f"{checkpoint}: got no {adapter_folder.CONFIG_FILE}, expected an adapter of this run"
        )
    try:
        stored = adapter_folder.read_adapter(checkpoint)
        adapter_folder.check_base(stored.plan.base, plan.base, checkpoint)
    except DataError as exc:
        raise RunStopped(str(exc)) from exc
    _refuse_others(checkpoint, *trained.load(stored.tensors))


def _check_names(checkpoint: Path, state: Mapping[str, Any], metadata: Metadata) -> None:
    stored = {key for key in metadata.state_dict_metadata if key.startswith(f"{WEIGHTS}/")}
    if not stored:
        kind = "an adapter" if adapter_folder.is_adapter(checkpoint) else "no model*.safetensors"
        raise RunStopped(f"{checkpoint}: got {kind}, expected the weights of a whole model")
    names = {key.partition("/")[2] for key in state}
    found = {key.partition("/")[2] for key in stored}
    _refuse_others(checkpoint, sorted(names - found), sorted(found - names))


def _refuse_others(checkpoint: Path, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        raise RunStopped(
            f"{checkpoint}: weights of another model, missing {missing[:3]}, unexpected {unexpected[:3]}; "
            "give the model that the checkpoint was made with"
        )


def _optimizer_targets(
    metadata: Metadata, trained: TrainedWeights, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    # fused kernels keep their step counters beside the weights
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    targets: dict[str, Tensor] = {}
    for key, stored in metadata.state_dict_metadata.items():
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        if kind != OPTIMIZER or not isinstance(stored, TensorStorageMetadata):
            continue
        if name not in trained.parameters:
            raise RunStopped(
                f"optimizer state of {name}: the model trains no such parameter, expected the same model"
            )
        parameter, dtype = trained.parameters[name], stored.properties.dtype
        if stored.size == parameter.shape:
            targets[key] = like_part(torch.empty_like(local_part(parameter), dtype=dtype), parameter)
        else:
            device = parameter.device if is_fused else torch.device("cpu")
            targets[key] = torch.empty(stored.size, dtype=dtype, device=device)
    return targets


def _shapes(trained: TrainedWeights) -> dict[str, Tensor]:
    return trained.untied_tensors()


def _private_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return kept.copy_(tensor)
