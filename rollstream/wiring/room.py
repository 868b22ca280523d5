"""Whether a learner rank has room for its model, from the headers of its files, before any is read [L-12].

What a packed row keeps comes on top and is for `rollstream doctor --memory` to say.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

import torch

from broker_schemas.errors import ConfigError
from broker_schemas.method.weight_files import tensors_of, weight_files
from configs import RunConfig
from learner.model_parts import part_of

GB: Final = 1e9
_FLOAT32_BYTES: Final = 4
_BF16_BYTES: Final = 2
_GRADIENT_AND_MOMENTS_BYTES: Final = 12
_CGROUP: Final = Path("/sys/fs/cgroup")


def check_room(config: RunConfig, folder: Path, device: torch.device) -> None:
    """Raise ConfigError where weights, gradients and moments of a rank do not fit into what is free.

    On a CPU all ranks of the host are counted; on a GPU its own memory, and the host's for the reading.
    """
    trained, frozen = count_weights(config, folder)
    rank_bytes = kept_bytes(config, trained, frozen)
    remedy = (
        "set training.lora.rank, training.sharding: full over more ranks, or take a smaller model; "
        "rollstream doctor --memory says what each comes to"
    )
    if device.type == "cuda":
        _refuse(rank_bytes, torch.cuda.mem_get_info(device)[0], f"a rank on {device}", remedy)
        wanted = _FLOAT32_BYTES * (trained + frozen)
        if wanted > free_host_bytes():
            raise ConfigError(
                f"model.name_or_path: its weights take {wanted / GB:.1f} GB of the host while they are read, "
                f"got {free_host_bytes() / GB:.1f} GB free; free some, or take a smaller model"
            )
        return
    num_ranks = config.learner_world_size
    _refuse(num_ranks * rank_bytes, free_host_bytes(), f"this host, for {num_ranks} ranks", remedy)


def count_weights(config: RunConfig, folder: Path) -> tuple[int, int]:
    """Return (trained, frozen) weights of a model folder; adapters, which are small, count as nothing."""
    frozen_parts = ("vision", "merger", "text") if config.training.lora.rank else config.training.freeze
    trained = frozen = 0
    for file in weight_files(folder):
        if not file.name.startswith("model"):
            # a checkpoint's optimizer lies beside its weights
            continue
        for tensor in tensors_of(file):
            number = math.prod(tensor.shape)
            if part_of(tensor.name) in frozen_parts:
                frozen += number
            else:
                trained += number
    return trained, frozen


def kept_bytes(config: RunConfig, trained: int, frozen: int) -> int:
    """Return the bytes of weights, gradients and moments that one rank keeps."""
    sharding = config.training.sharding
    is_whole = sharding == "none"
    if is_whole and config.precision == "bf16":
        # the optimizer's weights beside those that compute
        return trained * (_BF16_BYTES + _FLOAT32_BYTES + _GRADIENT_AND_MOMENTS_BYTES) + frozen * _BF16_BYTES
    whole = trained * (_FLOAT32_BYTES + _GRADIENT_AND_MOMENTS_BYTES) + frozen * _FLOAT32_BYTES
    if is_whole:
        return whole
    on_node = len(config.devices.learner_gpus) or config.learner_world_size
    return whole // (config.learner_world_size if sharding == "full" else on_node)


def free_host_bytes() -> int:
    """Return the bytes of memory that this host, or the container around this process, can still give."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
        free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), free)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        counts = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        # files that are only kept for the next reader are given up when memory is short
        used -= sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdecimal() else free


def _refuse(wanted_bytes: int, free_bytes: int, where: str, remedy: str) -> None:
    if wanted_bytes > free_bytes:
        raise ConfigError(
            f"model.name_or_path: weights, gradients and moments need {wanted_bytes / GB:.1f} GB, got "
            f"{free_bytes / GB:.1f} GB free on {where}; {remedy}"
        )
