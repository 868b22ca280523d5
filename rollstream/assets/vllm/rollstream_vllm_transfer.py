"""A weight transfer engine of vLLM: weights that the learner's rank 0 sends over a process group.

Stands alone: it runs in vLLM's environment, where no package of ours is installed. The other end is
``broker_schemas/rollout_servers/server_group.py``. gloo carries bytes between any two machines, nccl between
GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

# torch's own annotations leave out half of what is used here
c10d: Any = dist


@dataclass(kw_only=True)
class JoinGroup(WeightTransferInitInfo):
    """Where the group meets; the learner is rank 0, the workers of this server follow."""

    group_name: str
    host: str
    port: int
    world_size: int
    transport: str
    timeout_s: float


@dataclass(kw_only=True)
class ReceiveBuckets(WeightTransferUpdateInfo):
    """What arrives: ``buckets`` of (name, dtype, shape, offset in bytes), each of ``sizes`` bytes in all."""

    buckets: list[list[tuple[str, str, list[int], int]]]
    sizes: list[int]


class GroupReceiver(WeightTransferEngine[JoinGroup, ReceiveBuckets]):
    """Receives buckets of bytes and loads what is in them.

    An exception in a worker could end the whole server, so it is kept as ``problem`` and asked for by the
    learner, which then knows that the weights are not whole.
    """

    init_info_cls = JoinGroup
    update_info_cls = ReceiveBuckets

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.group_name = ""
        self.problem: str | None = None
        self._group: Any = None
        self._store: Any = None

    def init_transfer_engine(self, init_info: JoinGroup) -> None:
        """Join the learner's group."""
        self.problem = None
        self.shutdown()
        self._attempt("joining the group", lambda: self._join(init_info))

    def start_weight_update(self) -> None:
        """Take the layers apart, as for any reload."""
        self.problem = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all weights; what goes wrong is kept as ``problem``."""
        self._attempt("receiving weights", lambda: super(GroupReceiver, self).update_weights(update_info))

    def receive_weights(self, update_info: ReceiveBuckets) -> None:
        """Load the tensors as they arrive."""
        if self._group is None:
            raise RuntimeError("no group was joined")
        self.model.load_weights(self._arriving(update_info))

    def finish_weight_update(self) -> None:
        """Put the layers together again, also after a problem: half a reload must not meet the next one."""
        self._attempt("finishing", lambda: finalize_layerwise_reload(self.model, self.model_config))

    def shutdown(self) -> None:
        """Leave the group."""
        group, self._group, self._store, self.group_name = self._group, None, None, ""
        if group is not None:
            group.abort()
            # gloo's connections close with their last reference, not before: the learner would wait on
            del group

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as exc:
            # the first problem is the cause of later ones
            self.problem = self.problem or f"{what}: {type(exc).__name__}: {exc}"
            # the learner's end notices at once, and opens a new group next time
            self.shutdown()

    def _join(self, info: JoinGroup) -> None:
        timeout = timedelta(seconds=info.timeout_s)
        self._store = c10d.TCPStore(
            info.host, info.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._store.set(f"here/{rank}", b"1")
        if info.transport == "nccl":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = c10d.ProcessGroupNCCL(self._store, rank, info.world_size, options)
        else:
            options = c10d.ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_own_address(info))]
            self._group = c10d.ProcessGroupGloo(self._store, rank, info.world_size, options)
        self._transport = info.transport
        self.group_name = info.group_name

    def _arriving(self, info: ReceiveBuckets) -> Iterator[tuple[str, torch.Tensor]]:
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        device = self.device if self._transport == "nccl" else torch.device("cpu")
        for bucket, size in zip(info.buckets, info.sizes, strict=True):
            # a new one each time: layers keep views of it until they are complete
            flat = torch.empty(size, dtype=torch.uint8, device=device)
            self._group.broadcast([flat], options).wait()
            here = flat.to(self.device)
            for name, dtype_name, shape, offset in bucket:
                dtype = getattr(torch, dtype_name)
                num_bytes = torch.Size(shape).numel() * dtype.itemsize
                yield name, here[offset : offset + num_bytes].view(dtype).view(shape)


def _own_address(info: JoinGroup) -> str:
    """Return the address of the interface that leads to the learner."""
    with socket.create_connection((info.host, info.port), timeout=info.timeout_s) as probe:
        return str(probe.getsockname()[0])
