"""Brings rollout servers to the weights that rank 0 just wrote, before the policy becomes current [V-2]."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

from broker_schemas.errors import (
    DeadlinePassed,
    RolloutServerError,
    RunStopped,
    ServerUnavailable,
)
from broker_schemas.rollout_servers.server_lock import HoldServer
from broker_schemas.rollout_servers.vllm_http import PauseMode, VllmServer
from broker_schemas.rollout_servers.weight_label import WeightLabel
from broker_schemas.rollout_servers.weight_sync import load_by_path, load_into_servers

LOG = logging.getLogger("rollstream.learner")
LOOK_EVERY_S = 1.0


@dataclass
class ServerSync:
    """The call ``(policy_version, weights_path)`` of rank 0 between writing weights and publishing them.

    ``wait`` lets rollouts in flight end first, ``keep`` freezes them and lets them go on with the new
    weights. The first sync of a run waits ``timeout_s`` for every server. Later ones go on without a server
    that does not answer, as a producer brings it up to date when it is back, but not without all of them.
    ``load_weights`` brings a published folder into one paused server.
    """

    doors: Sequence[VllmServer]
    timeout_s: float
    mode: PauseMode = "wait"
    load_weights: Callable[[VllmServer, str], None] = load_by_path
    hold: HoldServer = field(default=lambda base_url: nullcontext())
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _is_first: bool = True

    def __call__(self, policy_version: int, weights_path: str) -> None:
        """Return when the servers hold the weights.

        Raises DeadlinePassed when too few servers answer in time, RunStopped with the reason when one that
        answers cannot load them.
        """
        label = WeightLabel(policy_version=policy_version, weights_path=weights_path)
        give_up_at = self.clock() + self.timeout_s
        while not self._attempt(label):
            if self.clock() >= give_up_at:
                self._raise_too_few(label)
            self.pause(LOOK_EVERY_S)
        self._is_first = False

    def close(self) -> None:
        """Drop all connections."""
        for door in self.doors:
            door.close()

    def _attempt(self, label: WeightLabel) -> bool:
        """Sync the servers that answer; return whether enough of them hold the weights now."""
        there = [door for door in self.doors if self._answers(door)]
        if not there or (self._is_first and len(there) < len(self.doors)):
            return False
        started = self.clock()
        failures = self._load(there, label)
        refusals = [error for error in failures.values() if not isinstance(error, ServerUnavailable)]
        if refusals:
            raise RunStopped(
                f"sync of policy version {label.policy_version}: {refusals[0]}; the servers must see "
                f"{label.weights_path} under this path"
            ) from refusals[0]
        num_synced = len(there) - len(failures)
        LOG.info(
            "policy version %d is on %d of %d rollout servers after %.3f s",
            *(label.policy_version, num_synced, len(self.doors), self.clock() - started),
        )
        return num_synced > 0 and not (self._is_first and failures)

    def _load(self, there: Sequence[VllmServer], label: WeightLabel) -> dict[str, RolloutServerError]:
        with ExitStack() as locks:
            try:
                # one order for all, so that two holders never wait for each other
                for door in sorted(there, key=lambda door: door.base_url):
                    locks.enter_context(self.hold(door.base_url))
            except ServerUnavailable as exc:
                raise DeadlinePassed(f"sync of policy version {label.policy_version}: {exc}") from exc
            return load_into_servers(there, label, self.mode, self.load_weights)

    def _answers(self, door: VllmServer) -> bool:
        if door.is_healthy():
            return True
        # kept-alive connections die with a server that was restarted
        door.reconnect()
        if door.is_healthy():
            return True
        LOG.warning("rollout server %s does not answer", door.base_url)
        return False

    def _raise_too_few(self, label: WeightLabel) -> None:
        missing = ", ".join(door.base_url for door in self.doors if not door.is_healthy()) or "none now"
        raise DeadlinePassed(
            f"sync of policy version {label.policy_version}: not enough rollout servers took the weights "
            f"within {self.timeout_s:g} s (vllm.server.timeout_s); not answering: {missing}; start them with "
            "'rollstream serve vllm'"
        )
