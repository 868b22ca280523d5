"""The place of a role that a run has once: a lease with a fencing token, kept while the process lives [Q-19].

Every script of its holder carries the token; once another holds the place, the scripts refuse it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from broker_schemas.broker.broker import Broker, Fence
from broker_schemas.errors import BrokerError, ConfigError, PlaceTaken

log = logging.getLogger(__name__)
LEASE_MS: Final = 15_000
KEEPS_PER_LEASE: Final = 3
LOOK_EVERY_S: Final = 0.25
SoleRole = Literal["learner", "packer", "dispatcher", "archive", "evaluator"]


class Lease:
    """A place that this process holds until ``release``, or until another takes it after a long silence."""

    def __init__(self, broker: Broker, role: SoleRole, token: int, lease_ms: int) -> None:
        self._broker = broker
        self._lease_ms = lease_ms
        self.role: SoleRole = role
        self.token = token

    @classmethod
    def take(
        cls,
        broker: Broker,
        role: SoleRole,
        *,
        lease_ms: int = LEASE_MS,
        pause: Callable[[float], object] = time.sleep,
    ) -> Lease:
        """Take the place, at once where it is free or its holder is gone, else when its lease has ended.

        Raises ConfigError naming a holder that goes on keeping it; BrokerError.
        """
        gone, ends_before, this_call = 0, -1.0, secrets.token_hex(8)
        while True:
            reply = _ask(broker, role, token=0, lease_ms=lease_ms, gone=gone, call=this_call)
            if reply[0]:
                return cls(broker, role, int(reply[0]), lease_ms)
            token, holder, left_ms = int(reply[1]), _read_holder(reply[2]), int(reply[3])
            if is_gone(holder):
                gone = token
                continue
            ends_at = time.monotonic() + left_ms / 1000
            if ends_before >= 0 and ends_at > ends_before + LOOK_EVERY_S:
                raise ConfigError(
                    f"{role} of run {broker.keys.run}: {describe(holder)} holds this place; a run has "
                    f"one {role}: stop that one first, or give this run a name of its own"
                )
            ends_before = ends_at if ends_before < 0 else ends_before
            pause(min(LOOK_EVERY_S, left_ms / 1000 + 0.01))

    def keep(self) -> None:
        """Prolong it; raises PlaceTaken once another holds the place, BrokerError."""
        reply = _ask(self._broker, self.role, token=self.token, lease_ms=self._lease_ms)
        if not reply[0]:
            raise PlaceTaken(
                f"{self.role} of run {self._broker.keys.run}: {describe(_read_holder(reply[2]))} took this "
                "place while this process was silent for longer than its lease; nothing more is written here"
            )

    def release(self) -> None:
        """Give the place back; one that was taken stays as it is. Raises BrokerError."""
        _ask(self._broker, self.role, token=self.token, lease_ms=0)


@contextmanager
def holding(
    broker: Broker, role: SoleRole, *, on_loss: Callable[[], object], lease_ms: int = LEASE_MS
) -> Iterator[tuple[Broker, Lease]]:
    """Hold the place of ``role`` within the block; yield the broker whose scripts carry its token.

    A thread keeps the lease. ``on_loss`` is called by it once another took the place, and the block ends with
    PlaceTaken then. Raises ConfigError where another holds it, BrokerError.
    """
    lease = Lease.take(broker, role, lease_ms=lease_ms)
    ended, losses = threading.Event(), list[PlaceTaken]()

    def keep() -> None:
        while not ended.wait(lease_ms / 1000 / KEEPS_PER_LEASE):
            try:
                lease.keep()
            except PlaceTaken as loss:
                losses.append(loss)
                on_loss()
                return
            except BrokerError as exc:
                log.debug("lease of the %s: %s; trying again", role, exc)

    keeper = threading.Thread(target=keep, name=f"lease-{role}", daemon=True)
    keeper.start()
    try:
        yield broker.fenced(Fence(role=role, token=lease.token)), lease
        if losses:
            raise losses[0]
    finally:
        ended.set()
        keeper.join(timeout=lease_ms / 1000)
        if not losses:
            try:
                lease.release()
            except BrokerError as exc:
                log.debug("lease of the %s: %s; it ends by itself", role, exc)


def own_holder() -> dict[str, Any]:
    """Return who this process is: enough to tell later, on this machine, whether it still lives."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "machine": _machine(),
    }


def is_gone(holder: Mapping[str, Any]) -> bool:
    """Say whether a holder is surely gone: it ran on this machine, and its process is not there any more.

    A stopped process is there.
    """
    if not holder.get("started") or holder.get("machine") != _machine():
        return False
    return bool(_start_of(int(holder.get("pid", 0))) != holder["started"])


def describe(holder: Mapping[str, Any]) -> str:
    """Return a holder as words."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _ask(broker: Broker, role: str, *, token: int, lease_ms: int, gone: int = 0, call: str = "") -> Any:
    arguments: list[str | int] = [token, json.dumps(own_holder()), lease_ms, role, gone, call]
    return broker.run("hold_lease", [f"lease:{role}"], arguments)


def _read_holder(raw: Any) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _start_of(pid: int) -> str:
    """Return when a process began, in ticks since the machine did; "" for none, or where this is not told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]


def _machine() -> str:
    """Return what tells this boot, and this space of process ids, from others; "" where it is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
