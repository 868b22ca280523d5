"""Ports of which a whole range is free: other programs of a busy machine hold single ones anywhere."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable


def is_free(port: int) -> bool:
    """Return whether a port of the loopback can be listened on now."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_base_port(offsets: Iterable[int], *, processes_each: int = 4) -> int:
    """Return a port from which on those at ``offsets``, and the next few after each, are free."""
    wanted = [offset + number for offset in offsets for number in range(processes_each)]
    for _ in range(1000):
        base_port = random.randrange(20_000, 60_000)
        if all(is_free(base_port + offset) for offset in wanted):
            return base_port
    raise AssertionError("no free range of ports on this machine")
