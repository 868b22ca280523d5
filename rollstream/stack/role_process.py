"""One process of the stack with its log: started, asked to end, killed. It must not know when."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rollstream.stack.bound_process import bound_command
from rollstream.stack.embedded_redis import Durability, EmbeddedRedis, socket_url
from rollstream.stack.private_socket import private_socket
from rollstream.stack.process_tree import children, kill_tree, send_signal

LOG_TAIL_BYTES = 32_768


class StackProcess(Protocol):
    """What the supervisor needs of a process."""

    @property
    def log_path(self) -> Path: ...

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""

    def start(self) -> None:
        """Start it, also again; raises BrokerUnavailable, OSError."""

    def poll(self) -> int | None:
        """Return None while it runs, else its exit status (negative: a signal)."""

    def terminate(self) -> None:
        """Ask it to end; called once."""

    def kill(self) -> None:
        """End it and everything below it, and wait for that."""

    def written(self) -> str:
        """Return the end of what it has written to its log since its last start."""


class RoleProcess:
    """A role in a session of its own, so that Ctrl-C does not reach it; it dies with this process.

    ``command`` is asked at every start; ``has_ranks`` says that its children are to be asked to end, not
    it: torchrun gives its ranks no time and counts their end as a failure.
    """

    def __init__(
        self,
        command: Callable[[], Sequence[str]],
        log_path: Path,
        environment: Mapping[str, str],
        *,
        has_ranks: bool = False,
    ) -> None:
        self._command = command
        self._environment = environment
        self._has_ranks = has_ranks
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start_bytes = 0
        self.log_path = log_path

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Start it with its output appended to its log; raises OSError."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = bound_command(list(self._command()), parent_pid=os.getpid())
        with self.log_path.open("ab") as log:
            self._log_start_bytes = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return its exit status once it has ended; what it left below itself is killed then."""
        if self._process is None or self._process.returncode is not None:
            return None if self._process is None else self._process.returncode
        # not reaped yet, so that its id still names its process group
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        kill_tree(self._process.pid)
        return self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM, to the ranks where there are any."""
        if self.pid is None:
            return
        ranks = children(self.pid) if self._has_ranks else []
        for pid in ranks or [self.pid]:
            send_signal(pid, signal.SIGTERM)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            kill_tree(self._process.pid)
            self._process.wait()

    def written(self) -> str:
        return _tail(self.log_path, self._log_start_bytes)


class BrokerProcess:
    """The embedded Redis of the stack, on one socket for its whole life: the roles know its URL."""

    def __init__(self, folder: Path, *, durability: Durability) -> None:
        self._folder = folder
        self._durability: Durability = durability
        self._server: EmbeddedRedis | None = None
        self._log_start_bytes = 0

    @property
    def log_path(self) -> Path:
        return self._folder / "redis.log"

    @property
    def url(self) -> str:
        return socket_url(private_socket(self._folder))

    @property
    def pid(self) -> int | None:
        if self._server is None or self._server.process.returncode is not None:
            return None
        return self._server.process.pid

    def start(self) -> None:
        """Start the server and wait until it answers; raises BrokerUnavailable."""
        self._log_start_bytes = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._server = EmbeddedRedis.start(
            self._folder,
            durability=self._durability,
            command_prefix=bound_command([], parent_pid=os.getpid()),
        )

    def poll(self) -> int | None:
        return None if self._server is None else self._server.process.poll()

    def terminate(self) -> None:
        if self._server is not None and self.pid is not None:
            self._server.process.terminate()

    def kill(self) -> None:
        if self._server is not None:
            self._server.process.kill()
            self._server.process.wait()

    def written(self) -> str:
        return _tail(self.log_path, self._log_start_bytes)


def _tail(path: Path, start_bytes: int) -> str:
    try:
        with path.open("rb") as log:
            size_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(min(start_bytes, size_bytes), size_bytes - LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
