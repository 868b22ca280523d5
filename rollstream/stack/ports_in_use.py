"""Free ports, and whether the ports of a configuration are free."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from broker_schemas.errors import ConfigError

LOOPBACK = "127.0.0.1"


def free_loopback_port() -> int:
    """Return a port that nobody uses on this machine's loopback now; another process may take it next."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def check_ports_free(host: str, ports: Mapping[int, str]) -> None:
    """Raise ConfigError naming every port of ``ports`` (port to its user) that cannot be listened on."""
    refusals = ((port, user, _refusal(host, port)) for port, user in ports.items())
    taken = [f"port {port} for {user}: {why}" for port, user, why in refusals if why]
    if taken:
        raise ConfigError(
            f"metrics.base_port: these ports on {host} cannot be used:\n  "
            + "\n  ".join(taken)
            + "\nset metrics.base_port to another port, or to 0 for no endpoints, or end who uses them"
        )


def _refusal(host: str, port: int) -> str:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""
