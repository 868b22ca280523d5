"""The order of a weight sync over several servers: pause all, load all, check all, go on all [V-2].

Whoever calls it holds the lock of every server in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from broker_schemas.errors import RolloutServerError
from broker_schemas.rollout_servers.vllm_http import PauseMode
from broker_schemas.rollout_servers.weight_label import LOADING, WeightLabel


class SyncDoor(Protocol):
    """What a sync needs of a server; see VllmServer."""

    @property
    def base_url(self) -> str: ...
    def pause(self, mode: PauseMode) -> None: ...
    def set_label(self, text: str) -> None: ...
    def load_weights(self, weights_path: str) -> None: ...
    def forget_old_weights(self) -> None: ...
    def resume(self) -> None: ...


Door = TypeVar("Door", bound=SyncDoor)


def load_by_path(server: SyncDoor, weights_path: str) -> None:
    """Let a server read a published folder by itself."""
    server.load_weights(weights_path)


def load_into_servers(
    servers: Sequence[Door],
    label: WeightLabel,
    mode: PauseMode,
    load_weights: Callable[[Door, str], None] = load_by_path,
) -> dict[str, RolloutServerError]:
    """Give every server the weights of ``label``; return what went wrong, by address. Empty: all have them.

    ``load_weights`` brings the folder of the label into one paused server.
    No server goes on before all that still take part have loaded, so no inference is in flight meanwhile.
    A server that fails is left as it is, paused and labelled as loading: nothing comes from unknown weights.
    """
    failures: dict[str, RolloutServerError] = {}

    def load(server: Door) -> None:
        # a crash from here on leaves a label that nobody takes for a policy version
        server.set_label(f"{LOADING} {label}")
        load_weights(server, label.weights_path)
        server.forget_old_weights()
        server.set_label(str(label))

    phases: tuple[Callable[[Door], None], ...] = (
        lambda server: server.pause(mode),
        load,
        lambda server: server.resume(),
    )
    for phase in phases:
        taking_part = [server for server in servers if server.base_url not in failures]
        failures.update(_in_parallel(taking_part, phase))
    return failures


def _in_parallel(servers: Sequence[Door], phase: Callable[[Door], None]) -> dict[str, RolloutServerError]:
    def attempt(server: Door) -> RolloutServerError | None:
        try:
            phase(server)
        except RolloutServerError as exc:
            return exc
        return None

    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        outcomes = list(pool.map(attempt, servers))
    pairs = zip(servers, outcomes, strict=True)
    return {server.base_url: error for server, error in pairs if error is not None}
