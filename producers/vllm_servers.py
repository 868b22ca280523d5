"""The rollout servers of a producer: which of them answer, and that each holds the published weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import RolloutServerError, ServerRefused, ServerUnavailable
from broker_schemas.rollout_servers.server_lock import HoldServer
from broker_schemas.rollout_servers.vllm_http import PauseMode, VllmServer, adapter_name
from broker_schemas.rollout_servers.weight_label import WeightLabel, parse_label
from broker_schemas.rollout_servers.weight_sync import load_into_servers
from producers.vllm_requests import Dialect

LOG = logging.getLogger("rollstream.producer")
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class LiveServer:
    """A server that answers and holds published weights.

    ``adapter_version``: the policy version of the adapter that ``model`` names, None where it is the model.
    """

    door: VllmServer
    model: str
    max_model_len: int
    world_size: int
    dialect: Dialect
    weights: WeightLabel
    adapter_version: int | None = None


@dataclass
class ServerFleet:
    """All servers of the configuration, in its order.

    ``hold`` locks a server against other processes that change its weights; ``startup_timeout_s`` bounds
    the wait for the first server that answers.
    """

    doors: Sequence[VllmServer]
    startup_timeout_s: float
    mode: PauseMode = "wait"
    hold: HoldServer = field(default=lambda base_url: nullcontext())
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _down: set[str] = field(default_factory=set)

    def follow(self, policy: PublishedPolicy) -> list[LiveServer]:
        """Return the servers that answer, each with the weights of ``policy`` or later ones of its run.

        A server that was away, or was left paused, is brought up to date first. Waits for at least one;
        raises ServerUnavailable when there is none in time, or what a server that answers got wrong.
        """
        wanted = WeightLabel(policy_version=policy.policy_version, weights_path=policy.weights_path)
        give_up_at = self.clock() + self.startup_timeout_s
        while True:
            live, errors = self._look(wanted)
            if live:
                return live
            for error in errors:
                if not isinstance(error, ServerUnavailable):
                    raise error
            if self.clock() >= give_up_at:
                raise ServerUnavailable(
                    f"no rollout server answers within {self.startup_timeout_s:g} s "
                    f"({'; '.join(str(error) for error in errors)}); start them with 'rollstream serve vllm'"
                )
            self.pause(LOOK_EVERY_S)

    def close(self) -> None:
        """Drop all connections."""
        for door in self.doors:
            door.close()

    def _look(self, wanted: WeightLabel) -> tuple[list[LiveServer], list[RolloutServerError]]:
        with ThreadPoolExecutor(max_workers=len(self.doors)) as pool:
            found = list(pool.map(lambda door: self._inspect(door, wanted), self.doors))
        live = [server for server in found if isinstance(server, LiveServer)]
        errors = [error for error in found if isinstance(error, RolloutServerError)]
        return live, errors

    def _inspect(self, door: VllmServer, wanted: WeightLabel) -> LiveServer | RolloutServerError:
        try:
            server = self._describe(door, wanted)
        except ServerUnavailable:
            # kept-alive connections die with a server that was restarted
            door.reconnect()
            try:
                server = self._describe(door, wanted)
            except RolloutServerError as exc:
                return self._note_down(door, exc)
        except RolloutServerError as exc:
            return self._note_down(door, exc)
        if door.base_url in self._down:
            LOG.info("rollout server %s is back with weights %s", door.base_url, server.weights)
        self._down.discard(door.base_url)
        return server

    def _note_down(self, door: VllmServer, error: RolloutServerError) -> RolloutServerError:
        if door.base_url not in self._down:
            LOG.warning("rollout server left out: %s", error)
        self._down.add(door.base_url)
        return error

    def _describe(self, door: VllmServer, wanted: WeightLabel) -> LiveServer:
        weights = self._up_to_date(door, wanted)
        model, max_model_len = door.model()
        return LiveServer(
            door=door,
            model=adapter_name(weights.weights_path) if door.takes_adapters else model,
            max_model_len=max_model_len,
            world_size=door.world_size(),
            dialect="tokens" if door.takes_token_ids() else "chat",
            weights=weights,
            adapter_version=weights.policy_version if door.takes_adapters else None,
        )

    def _up_to_date(self, door: VllmServer, wanted: WeightLabel) -> WeightLabel:
        held = self._usable(door, wanted)
        if held is not None:
            return held
        with self.hold(door.base_url):
            # the learner's sync may have done it while this waited for the lock
            held = self._usable(door, wanted)
            if held is not None:
                return held
            LOG.info("bringing %s to policy version %d", door.base_url, wanted.policy_version)
            failures = load_into_servers([door], wanted, self.mode)
            if failures:
                raise failures[door.base_url]
        return wanted

    def _usable(self, door: VllmServer, wanted: WeightLabel) -> WeightLabel | None:
        held = parse_label(door.label())
        if held is None or not held.covers(wanted) or door.is_paused():
            return None
        return held


def check_room(servers: Sequence[LiveServer], num_tokens: int) -> None:
    """Raise ServerRefused when a server is too small for ``num_tokens`` of prompt and response.

    A server would cut such a rollout without a word.
    """
    for server in servers:
        if server.max_model_len < num_tokens:
            raise ServerRefused(
                f"{server.door.base_url}: max_model_len is {server.max_model_len}, prompt and response need "
                f"up to {num_tokens}; serve with a larger --max-model-len or lower max_new_tokens"
            )
