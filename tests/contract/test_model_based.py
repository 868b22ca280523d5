"""Random interleavings of all roles and their crashes against a plain-Python model, on both servers."""

from __future__ import annotations

import itertools
import os

import fakeredis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.keys import RunKeys
from tests.contract.queue_machine import QueueMachine

pytestmark = pytest.mark.timeout(400)  # several learners, on a machine that may be busy

RUN_NUMBERS = itertools.count()


def drive(machine: type[QueueMachine], *, num_runs: int, num_steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_runs,
            stateful_step_count=num_steps,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.req("Q-2", "Q-4", "Q-5", "Q-6", "Q-8", "Q-12", "Q-14", "Q-17", "O-6")
def test_any_interleaving_on_fakeredis_is_what_the_model_says() -> None:
    class OnFakeredis(QueueMachine):
        def new_broker(self) -> Broker:
            broker = Broker(fakeredis.FakeRedis(), RunKeys(f"m{next(RUN_NUMBERS)}"))
            broker.make_groups()
            return broker

    drive(OnFakeredis, num_runs=18, num_steps=150)


@pytest.mark.req("Q-2", "Q-4", "Q-5", "Q-6", "Q-8", "Q-12", "Q-14", "Q-17", "O-6")
def test_any_interleaving_on_a_real_server_is_what_the_model_says(redis_url: str) -> None:
    class OnRedis(QueueMachine):
        def new_broker(self) -> Broker:
            run = f"m{os.getpid()}-{next(RUN_NUMBERS)}"
            return Broker.connect(run, BrokerAddress(url=redis_url))

    drive(OnRedis, num_runs=30, num_steps=150)
