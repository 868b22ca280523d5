"""One model over several ranks: who reads it, who receives it, and how FSDP2 spreads it [L-3].

The second file with collectives: torch runs them inside the forward and backward passes of what is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from broker_schemas.errors import ConfigError
from broker_schemas.method.adapters import tie_coordinate_rows
from learner.distributed import Ranks
from learner.packed_forward import RowLoss

Precision = Literal["bf16", "float32"]
Sharding = Literal["none", "full", "hybrid"]


def place_model(row_loss: RowLoss, ranks: Ranks, sharding: Sharding, precision: Precision) -> None:
    """Bring the model of ``row_loss`` onto this rank's device, sharded in place unless ``none``.

    Rank 0 has the weights; a model on the meta device receives them, one layer at a time, so that no other
    rank ever holds the whole of it in host memory. Raises ConfigError for ranks that cannot share.
    """
    model = row_loss.model
    if precision == "bf16":
        # before others make room for them: a frozen weight has no exact copy, so nobody needs its float32
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if ranks.world_size > 1:
        _make_room(model, ranks)
    if sharding == "none":
        model.to(ranks.device)
        ranks.receive(_tensors(model))
        return
    mesh = _mesh(ranks, sharding)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*_layers(model), row_loss):
        module.to(ranks.device)
        ranks.receive([tensor for tensor in _tensors(module) if not is_sharded(tensor)])
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in row_loss.modules():
        if isinstance(module, FSDPModule):
            # the loss is divided by the segments of all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of ``tensor``, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of ``tensor``; every rank must ask for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def take_whole(into: Tensor, values: Tensor) -> None:
    """Overwrite this rank's part of ``into`` with its part of ``values``, which is all of it."""
    if isinstance(into, DTensor):
        placed = distribute_tensor(
            values.to(into.device), into.device_mesh, into.placements, src_data_rank=None
        )
        into.to_local().copy_(placed.to_local())
    else:
        into.copy_(values)


def like_part(local: Tensor, whole_of: Tensor) -> Tensor:
    """Return ``local`` as this rank's part of a tensor that is spread as ``whole_of`` is."""
    if not isinstance(whole_of, DTensor):
        return local
    return DTensor.from_local(
        local,
        whole_of.device_mesh,
        whole_of.placements,
        run_check=False,
        shape=whole_of.shape,
        stride=whole_of.stride(),
    )


@dataclass(frozen=True, kw_only=True)
class HeldBlock:
    """Where this rank's part of a tensor begins, and which of the ranks that hold the same one it is."""

    offsets: tuple[int, ...]
    copy: int
    num_copies: int


def block_of(tensor: Tensor) -> HeldBlock | None:
    """Return which part of ``tensor`` this rank holds, None for all of it."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "every rank is in the mesh"
    chunk = tensor.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]
    is_copied = mesh.ndim == 2
    return HeldBlock(
        offsets=tuple(chunk.offsets),
        copy=place[0] if is_copied else 0,
        num_copies=mesh.size(0) if is_copied else 1,
    )


def num_copies(tensor: Tensor, world_size: int) -> int:
    """Return how many ranks hold the same part of ``tensor``."""
    if not isinstance(tensor, DTensor):
        return world_size
    return world_size // tensor.device_mesh.size(tensor.device_mesh.ndim - 1)


def _mesh(ranks: Ranks, sharding: Sharding) -> DeviceMesh:
    if ranks.world_size == 1:
        raise ConfigError(
            f"training.sharding: got {sharding} with one rank, which has nobody to share with; set none"
        )
    if sharding == "full":
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    local = ranks.local_world_size
    if local == 1 or ranks.world_size % local:
        raise ConfigError(
            f"training.sharding: got hybrid with {local} ranks on this node of {ranks.world_size} in all, "
            "expected the same number, 2 or more, on every node; set full or none"
        )
    shape = (ranks.world_size // local, local)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("copy", "shard"))


def _make_room(model: Any, ranks: Ranks) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        # memory that nobody wrote costs nothing on the host
        model.to_empty(device="cpu")
        model.tie_weights()
        tie_coordinate_rows(model)


def _layers(model: Any) -> Iterator[torch.nn.Module]:
    """Yield the repeated blocks of vision and text, each of which is gathered by itself."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in module.parameters()), *module.buffers()]
