"""A producer that hangs in generation: its lease ends in time, and so does its process."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import (
    RolloutRequest,
    issue_requests,
    reissue_expired,
)
from broker_schemas.client import SegmentSink
from producers import producer as producing
from producers.metrics import ProducerMetrics
from producers.producer import Producer
from tests.builders.settings import lease_settings, producer_settings

LEASE = lease_settings(lease_ms=300, max_attempts=3)


class HungBackend:
    """Generates nothing until ``freed``, deaf to every signal."""

    processor_fingerprint = "f"
    policy_version = 0

    def __init__(self, freed: threading.Event) -> None:
        self.freed = freed

    def follow(self, policy: Any) -> None:
        """Take whatever is published."""

    def generate(self, samples: Any, seeds: Any, *, purpose: str) -> Any:
        assert self.freed.wait(30), "nobody ended the process that hangs"
        raise RuntimeError("it came back after all")


def a_producer(broker: Broker, backend: Any, leave: Any, *, job_timeout_s: int) -> Producer:
    return Producer(
        broker=broker,
        sink=SegmentSink(broker),
        backend=backend,
        datasets={"train": [None]},  # type: ignore[list-item]
        metrics=ProducerMetrics(CollectorRegistry()),
        settings=producer_settings(name="p", version_window=0, lease=LEASE, job_timeout_s=job_timeout_s),
        leave=leave,
    )


@pytest.mark.req("O-5", "Q-11")
def test_a_hung_generation_loses_its_lease_at_the_job_timeout_and_its_process_leaves(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producing, "HUNG_AFTER_TIMEOUT_S", 1.0)
    request = RolloutRequest(request_id="r-1", samples=((0, 1),), policy_version=0)
    issue_requests(real_broker, [request], cursor=0, next_cursor=1, lease=LEASE)
    publish_policy(real_broker, policy_version=0, optimizer_step=0, weights_path="w")
    freed, at_the_end = threading.Event(), []

    def leave() -> None:
        at_the_end.extend(reissue_expired(real_broker, LEASE))
        freed.set()

    with pytest.raises(RuntimeError, match="came back"):
        a_producer(real_broker, HungBackend(freed), leave, job_timeout_s=1).run(request)

    assert [(item.request.request_id, item.attempt, item.waits) for item in at_the_end] == [("r-1", 2, False)]


@pytest.mark.req("O-5", "Q-4")
def test_a_request_that_failed_here_waits_again_and_costs_no_attempt(real_broker: Broker) -> None:
    request = RolloutRequest(request_id="r-1", samples=((0, 1),), policy_version=0)
    issue_requests(real_broker, [request], cursor=0, next_cursor=1, lease=LEASE)
    publish_policy(real_broker, policy_version=0, optimizer_step=0, weights_path="w")
    freed = threading.Event()
    freed.set()
    with pytest.raises(RuntimeError, match="came back"):
        a_producer(real_broker, HungBackend(freed), lambda: None, job_timeout_s=60).run(request)
    over = lease_settings(lease_ms=-1, max_attempts=3)
    real_broker.client.zadd(real_broker.keys.named("requests"), {"r-1": 1})
    assert [(item.attempt, item.waits) for item in reissue_expired(real_broker, over)] == [(1, True)]


@pytest.mark.req("O-5", "Q-11")
def test_a_timeout_that_falls_into_the_start_of_a_job_ends_the_job_and_nothing_else(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a timeout that is raised once the thread of the lease runs, as RQ's signal may be."""
    monkeypatch.setattr(producing, "HUNG_AFTER_TIMEOUT_S", 0.05)
    request = RolloutRequest(request_id="r-1", samples=((0, 1),), policy_version=0)
    issue_requests(real_broker, [request], cursor=0, next_cursor=1, lease=LEASE)
    start, keepers = threading.Thread.start, list[threading.Thread]()

    def interrupted(self: threading.Thread) -> None:
        start(self)
        keepers.append(self)
        raise TimeoutError("job timeout")

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    left: list[bool] = []
    producer = a_producer(real_broker, None, lambda: left.append(True), job_timeout_s=0)
    assert producer.run(request) == []  # an accident of the place: it goes back unspent
    monkeypatch.undo()

    keepers[0].join(timeout=5)
    assert not keepers[0].is_alive()
    assert left == []
