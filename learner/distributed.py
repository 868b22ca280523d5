"""The only file with collectives: what ranks tell each other, with a deadline on every wait [Q-11].

Small values go through the rendezvous store, where an absent rank can be named; gradients go through one
summed all-reduce, entered only after every rank has said that it is there. A failure on one rank reaches
all of them as the same ``RunStopped``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from broker_schemas.errors import DeadlinePassed, NonFiniteLoss, RunStopped

BUCKET_BYTES: Final = 64 * 1024 * 1024
# checked, not waited for: a wait that times out makes the store write warnings to stderr
_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.02
_WHO_IS_LEFT_S: Final = 10.0
_SIGN_OF_LIFE_S: Final = 1.0
# torchrun sends SIGTERM to the ranks that are left when one dies, and SIGKILL 30 s later
_STOPPING_WAIT_S: Final = 20.0
_STOPPING: Final = "a stop was asked for while waiting"
_FAILURE_KEY: Final = "rollstream/failure"
_STOPS: Final[dict[str, type[RunStopped]]] = {
    kind.__name__: kind for kind in (RunStopped, DeadlinePassed, NonFiniteLoss)
}


class Ranks:
    """All learner processes of a run, seen from one of them.

    Every method that waits must be called by all ranks in the same order. One rank needs no process group.
    ``is_stopping`` says whether this process was asked to stop: it then waits 20 s at most for the others.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        stall_timeout_s: float,
        store: Any = None,
        is_stopping: Callable[[], bool] = lambda: False,
        local_world_size: int = 0,
    ) -> None:
        self._local_world_size = local_world_size
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._stall_timeout_s = stall_timeout_s
        self._store = store
        self._is_stopping = is_stopping
        self._turn = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, *, what: str, timeout_s: float | None = None) -> list[Any]:
        """Return the JSON ``value`` of every rank in rank order; ``what`` names the wait in errors.

        Raises DeadlinePassed naming the missing ranks, or the failure that a rank announced.
        """
        if self.world_size == 1:
            return [value]
        self._turn += 1
        self._post(f"{self._turn}/{self.rank}", value)
        values = self._await(range(self.world_size), what, timeout_s)
        if self._turn > 2:
            # whoever posted this turn has read the one before it, so nobody needs the one before that
            self._store.delete_key(f"rollstream/{self._turn - 2}/{self.rank}")
        return values

    def broadcast(self, value: Any, *, what: str, timeout_s: float | None = None) -> Any:
        """Return the JSON ``value`` of rank 0 on every rank; the
        others' value is ignored. Errors as ``gather``.
        """
        return self.gather(value if self.is_first else None, what=what, timeout_s=timeout_s)[0]

    def barrier(self, *, what: str, timeout_s: float | None = None) -> None:
        """Return when every rank has arrived. Errors as ``gather``."""
        self.gather(None, what=what, timeout_s=timeout_s)

    def wait_for_first(self, work: Callable[[], None], *, what: str) -> None:
        """Run ``work`` on rank 0 while the others wait, however long it takes and as long as rank 0 lives.

        Raises what ``work`` raises, on rank 0. Other errors as ``gather``.
        """
        self.wait_for_all(work if self.is_first else _nothing, what=what)

    def wait_for_all(self, work: Callable[[], None], *, what: str) -> None:
        """Run each rank's ``work``; return when all are done, however long that takes, as long as all live.

        Raises at once what the work of this rank raises. Other errors as ``gather``.
        """
        if self.world_size == 1:
            work()
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rank-work") as pool:
            running = pool.submit(work)
            are_done = False
            while not are_done:
                wait([running], timeout=min(_SIGN_OF_LIFE_S, self._stall_timeout_s / 4))
                if running.done():
                    running.result()
                are_done = all(self.gather(running.done(), what=what))

    def post(self, key: str, value: Any) -> None:
        """Leave the JSON ``value`` of this rank for whoever looks for it; from any thread."""
        if self.world_size > 1:
            self._post(f"note/{key}/{self.rank}", value)

    def posted(self, key: str) -> dict[int, Any]:
        """Return, by rank, what ``post`` left so far under ``key``, without waiting; from any thread."""
        found = {rank: f"rollstream/note/{key}/{rank}" for rank in range(self.world_size)}
        return {
            rank: json.loads(self._store.get(place)) for rank, place in found.items() if self._is_there(place)
        }

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the ranks; a missing gradient counts as zero.

        One flat all-reduce per bucket of at most 64 MiB, in parameter
        order. Raises RunStopped when a rank is lost.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            try:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            except RuntimeError as exc:
                self._raise_rank_lost(exc)
            pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0; the same shapes in the same order on every rank."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            try:
                dist.broadcast(tensor, src=0)
            except RuntimeError as exc:
                self._raise_rank_lost(exc, "handing out the weights")

    def sum_number(self, value: Tensor) -> Tensor:
        """Return the sum of a one-element tensor over the ranks."""
        if self.world_size == 1:
            return value
        total = value.clone()
        try:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        except RuntimeError as exc:
            self._raise_rank_lost(exc, "the gradient norm")
        return total

    @property
    def local_world_size(self) -> int:
        """Ranks on this node, as torchrun says; all of them without it."""
        return self._local_world_size or self.world_size

    def announce_failure(self, error: BaseException) -> RunStopped:
        """Tell all ranks that this one stops; return what every rank raises. The first to announce stands."""
        if isinstance(error, RunStopped):
            stop = error
        else:
            stop = RunStopped(f"rank {self.rank} stopped: {type(error).__name__}: {error}")
        if self.world_size > 1:
            body = json.dumps({"kind": type(stop).__name__, "reason": str(stop)})
            try:
                first = self._store.compare_set(_FAILURE_KEY, "", body).decode()
            except RuntimeError:  # the store left with its host; the error itself still stands
                return stop
            if first != body:
                return _as_stop(first)
        return stop

    def close(self) -> None:
        """Leave the process group; safe to call twice and after a failure."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _post(self, key: str, value: Any) -> None:
        try:
            self._store.set(f"rollstream/{key}", json.dumps(value))
        except RuntimeError as exc:
            self._raise_store_lost(exc)

    def _await(self, ranks: Sequence[int], what: str, timeout_s: float | None) -> list[Any]:
        limit_s = self._stall_timeout_s if timeout_s is None else timeout_s
        limited_by = "stage2_async.stall_timeout_s"
        keys = [f"rollstream/{self._turn}/{rank}" for rank in ranks]
        started, pause_s = monotonic(), _FIRST_PAUSE_S
        while not all(self._is_there(key) for key in keys):
            if self._is_there(_FAILURE_KEY):
                raise _as_stop(self._store.get(_FAILURE_KEY).decode())
            waited_s = monotonic() - started
            if waited_s >= limit_s:
                missing = [
                    str(rank) for rank, key in zip(ranks, keys, strict=True) if not self._is_there(key)
                ]
                raise DeadlinePassed(
                    f"{what}: rank {', '.join(missing)} did not arrive within {limit_s:g} s ({limited_by}); "
                    "look at its log, then resume from the last checkpoint"
                )
            if self._is_stopping() and limited_by != _STOPPING:
                limit_s, limited_by = min(limit_s, waited_s + _STOPPING_WAIT_S), _STOPPING
            sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as exc:
            self._raise_store_lost(exc)

    def _raise_rank_lost(self, exc: RuntimeError, what: str = "gradient sum") -> NoReturn:
        # whoever is still there arrives at once; the deadline then names who is not
        self.gather(
            None, what=f"{what} broke off ({exc})", timeout_s=min(_WHO_IS_LEFT_S, self._stall_timeout_s)
        )
        raise RunStopped(
            f"rank {self.rank}: {what} broke off ({exc}) although all ranks are there; resume from "
            "the last checkpoint"
        ) from exc

    def _raise_store_lost(self, exc: RuntimeError) -> NoReturn:
        raise DeadlinePassed(
            f"rank {self.rank}: the rendezvous store is gone, so the process that hosts it (rank 0, or "
            f"torchrun) has died ({exc}); resume from the last checkpoint"
        ) from exc


def connect(
    *,
    rank: int,
    world_size: int,
    stall_timeout_s: float,
    device: torch.device,
    rendezvous_url: str = "env://",
    is_stopping: Callable[[], bool] = lambda: False,
    local_world_size: int = 0,
) -> Ranks:
    """Return the ranks of this run: gloo on CPU, nccl on GPU; one rank needs no rendezvous.

    ``rendezvous_url`` as in torch.distributed (``env://`` under torchrun, ``tcp://host:port``,
    ``file://path``). Raises DeadlinePassed when not all ranks come within ``stall_timeout_s``.
    """
    if world_size == 1:
        return Ranks(rank=0, world_size=1, device=device, stall_timeout_s=stall_timeout_s)
    timeout = timedelta(seconds=stall_timeout_s)
    try:
        store, _, _ = next(rendezvous(rendezvous_url, rank, world_size, timeout=timeout))
        dist.init_process_group(
            # a checkpoint is written from copies on the CPU, which torch asks a backend for
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("gradients", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistError, RuntimeError) as exc:
        raise DeadlinePassed(
            f"rank {rank}: not all {world_size} ranks came within {stall_timeout_s:g} s ({exc}); "
            "check devices.learner_world_size and the logs of the other ranks"
        ) from exc
    return Ranks(
        rank=rank,
        world_size=world_size,
        device=device,
        stall_timeout_s=stall_timeout_s,
        store=store,
        is_stopping=is_stopping,
        local_world_size=local_world_size,
    )


def _nothing() -> None:
    """Work of a rank that only waits."""


def _as_stop(body: str) -> RunStopped:
    announced = json.loads(body)
    return _STOPS.get(announced["kind"], RunStopped)(announced["reason"])


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled_bytes, dtype = 0, None
    for gradient in gradients:
        if not buckets or filled_bytes + gradient.nbytes > BUCKET_BYTES or gradient.dtype != dtype:
            buckets.append([])
            filled_bytes = 0
        buckets[-1].append(gradient)
        filled_bytes += gradient.nbytes
        dtype = gradient.dtype
    return buckets
