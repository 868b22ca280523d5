"""The one other file with collectives: a process group of rank 0 and the workers of one rollout server.

Its other end is ``rollstream/assets/vllm/rollstream_vllm_transfer.py``. gloo carries bytes between any two
machines, nccl between GPUs. No learner rank but 0 takes part, so it can block no step of theirs.
"""

from __future__ import annotations

import secrets
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from broker_schemas.errors import ServerFailed, ServerUnavailable
from broker_schemas.rollout_servers.vllm_http import VllmServer

LOOK_EVERY_S: Final = 0.005
# torch's own annotations leave out half of what is used here
c10d: Any = dist
CONNECT_TIMEOUT_S: Final = 5.0


class ServerGroup:
    """An open group; rank 0 is this process."""

    def __init__(self, name: str, transport: str, store: Any, group: Any) -> None:
        self.name = name
        self.transport = transport
        self._store = store
        self._group = group

    @classmethod
    def open(cls, door: VllmServer, device: torch.device, timeout_s: float) -> ServerGroup:
        """Meet all workers of a server: by nccl where ``device`` and server are GPUs, else by gloo.

        Listens on the one interface that leads to the server. Raises RolloutServerError when a worker does
        not come within ``timeout_s``.
        """
        name, transport = secrets.token_hex(8), _transport(door, device)
        address = _address_towards(door.base_url)
        world_size = 1 + door.world_size()
        timeout = timedelta(seconds=timeout_s)
        with socket.create_server((address, 0), family=_family(address)) as listener:
            port = listener.getsockname()[1]
            store = c10d.TCPStore(
                address,
                port,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                # the store closes what it is given
                master_listen_fd=listener.detach(),
            )
        meeting = {"group_name": name, "host": address, "port": port, "world_size": world_size}
        with ThreadPoolExecutor(max_workers=1) as pool:
            joining = pool.submit(
                door.init_weight_transfer, {**meeting, "transport": transport, "timeout_s": timeout_s}
            )
            _await_workers(store, world_size, joining, door, timeout_s)
            try:
                group = _group(store, world_size, transport, address, timeout)
            except RuntimeError as exc:
                raise ServerFailed(f"{door.base_url}: the {transport} group did not form: {exc}") from exc
            joining.result()
        return cls(name, transport, store, group)

    def send(self, row: torch.Tensor) -> None:
        """Send a row of bytes (N,) uint8 to all workers; raises ServerFailed when one of them is gone."""
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        try:
            self._group.broadcast([row], options).wait()
        except RuntimeError as exc:
            raise ServerFailed(f"{self.transport} group: a worker is gone: {exc}") from exc

    def close(self) -> None:
        """Leave; workers that still wait get an error at once. Safe to call twice."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            with suppress(RuntimeError):
                group.abort()
            # gloo's connections close with their last reference, not before: a peer would wait on
            del group


def _transport(door: VllmServer, device: torch.device) -> str:
    return "nccl" if device.type == "cuda" and door.device() == "cuda" else "gloo"


def _address_towards(base_url: str) -> str:
    """Return this machine's address on the interface that leads to a server."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((str(parts.hostname), port), timeout=CONNECT_TIMEOUT_S) as probe:
            return str(probe.getsockname()[0])
    except OSError as exc:
        raise ServerUnavailable(f"{base_url}: no connection ({exc}); is it running?") from exc


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _await_workers(
    store: Any, world_size: int, joining: Future[None], door: VllmServer, timeout_s: float
) -> None:
    """Return when every worker has found the store: from then on, the group forms or fails by itself."""
    give_up_at = time.monotonic() + timeout_s
    while not store.check([f"here/{rank}" for rank in range(1, world_size)]):
        if joining.done():
            joining.result()
            problem = door.transfer_problem() or "its workers did not come"
            raise ServerFailed(f"{door.base_url}: no group for weights: {problem}")
        if time.monotonic() > give_up_at:
            raise ServerUnavailable(f"{door.base_url}: its workers joined no group within {timeout_s:g} s")
        time.sleep(LOOK_EVERY_S)


def _group(store: Any, world_size: int, transport: str, address: str, timeout: timedelta) -> Any:
    if transport == "nccl":
        nccl = c10d.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return c10d.ProcessGroupNCCL(store, 0, world_size, nccl)
    gloo = c10d.ProcessGroupGloo._Options()
    gloo._timeout = timeout
    gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
    return c10d.ProcessGroupGloo(store, 0, world_size, gloo)
