"""A role that is really frozen (SIGSTOP) past its lease and thawed (SIGCONT) writes nothing more [Q-19]."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker, Fence
from broker_schemas.broker.lease import Lease
from tests.builders.configs import PROJECT_ROOT

LEASE_MS = 600
# holds the place and writes with it, as fast as it may, until a script refuses it
HOLDER = """
import sys, time
from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.lease import holding
from broker_schemas.errors import PlaceTaken
broker = Broker.connect(sys.argv[1], BrokerAddress(url=sys.argv[2]))
step = 0
try:
    with holding(broker, sys.argv[3], on_loss=lambda: None, lease_ms=int(sys.argv[4])) as (held, lease):
        while True:
            held.run("open_step", ["open_step", "matched"], [step, 0, 1])
            step += 1
            if step == 3:
                print("writing", flush=True)
            time.sleep(0.01)
except PlaceTaken as loss:
    print(loss, flush=True)
    sys.exit(7)
"""


def opened_step(broker: Broker) -> int:
    found = broker.client.hget(broker.keys.named("open_step"), "optimizer_step")
    return int(found)  # type: ignore[arg-type]


@pytest.mark.req("Q-19")
@pytest.mark.parametrize("role", ["learner", "archive"])
def test_a_frozen_holder_that_thaws_is_refused_and_leaves_by_name(
    real_broker: Broker, redis_url: str, tmp_path: Path, role: str
) -> None:
    arguments = [real_broker.keys.run, redis_url, role, str(LEASE_MS)]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "writing\n"
        os.kill(holder.pid, signal.SIGSTOP)
        taken = Lease.take(real_broker, role, lease_ms=60_000)  # type: ignore[arg-type]
        before = opened_step(real_broker)
        os.kill(holder.pid, signal.SIGCONT)
        said, _ = holder.communicate(timeout=30)
        assert holder.returncode == 7
        assert f"process {os.getpid()}" in said
        assert opened_step(real_broker) == before
        fenced = real_broker.fenced(Fence(role=role, token=taken.token))
        assert fenced.run("open_step", ["open_step", "matched"], [before + 1, 0, 1]) == 1
    finally:
        holder.kill()
        holder.wait()
