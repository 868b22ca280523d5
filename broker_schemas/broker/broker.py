"""One run's broker: the client, the keys and the way to call a transition. The doors are built on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import redis

from broker_schemas.broker.connection import (
    BrokerAddress,
    broker_errors,
    check_keeps_everything,
    check_server,
    open_redis,
)
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP, RunKeys
from broker_schemas.broker.script_library import Argument, run_script
from broker_schemas.errors import BrokerFull, GroupGone

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fence:
    """The place that a caller holds: its scripts are refused once another holds it with a greater token."""

    role: str
    token: int


@dataclass(frozen=True)
class Broker:
    """A connected run. Safe to share between threads, not between processes."""

    client: redis.Redis
    keys: RunKeys
    address: BrokerAddress = field(default_factory=lambda: BrokerAddress(url=""))
    fence: Fence | None = None

    @classmethod
    def connect(cls, run: str, address: BrokerAddress, *, socket_timeout_s: float = 30.0) -> Broker:
        """Open the run on the broker at ``address`` and make its groups; raises BrokerError."""
        keys = RunKeys(run)
        broker = cls(open_redis(address, socket_timeout_s=socket_timeout_s), keys, address)
        check_server(broker.client, address)
        check_keeps_everything(broker.client, address)
        # a full server refuses even groups that are there; one that is not shows when it is read
        with suppress(BrokerFull):
            broker.make_groups()
        return broker

    def make_groups(self) -> None:
        """Make the consumer groups, from the start of their streams; groups that exist stay."""
        for stream, group in (("segments", MATCHER_GROUP), ("matched", PACKER_GROUP)):
            with broker_errors(f"making group {group}"):
                try:
                    self.client.xgroup_create(self.keys.named(stream), group, id="0", mkstream=True)
                except redis.exceptions.ResponseError as exc:
                    if not str(exc).startswith("BUSYGROUP"):
                        raise

    def run(
        self,
        script: str,
        named_keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        bodies: Sequence[tuple[str, bytes]] = (),
    ) -> Any:
        """Call a transition on ``events``, ``counters`` and ``named_keys``; raises BrokerError.

        Raises PlaceTaken, with nothing changed, where this broker is fenced and another took the place, and
        GroupGone, once the groups are made again, where the broker forgot them.
        ``bodies`` are pairs (key, bytes) that it finds in the broker, put there just before it.
        """
        keys = [self.keys.named(name) for name in ("events", "counters", *named_keys)]
        try:
            return run_script(self.client, script, keys, [self._prefix, *arguments], bodies)
        except GroupGone as exc:
            self.make_lost_groups(exc)
            raise

    def make_lost_groups(self, found: GroupGone) -> None:
        """Make the groups again that the broker forgot, and say what that means; raises BrokerError."""
        log.error(
            "%s; the broker lost what it held of this run (FLUSHALL, or a restart without its file); the "
            "group is made again",
            found,
        )
        self.make_groups()

    def fenced(self, fence: Fence) -> Broker:
        """Return the same broker for the holder of a place."""
        return replace(self, fence=fence)

    @property
    def _prefix(self) -> str:
        prefix, fence = self.keys.prefix, self.fence
        return prefix if fence is None else f"{prefix}\n{fence.role} {fence.token}"

    def close(self) -> None:
        self.client.close()
