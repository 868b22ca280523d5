"""An accident of the place costs a producer time and the run no rollout: weights, images, servers, disks."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.policy import PublishedPolicy, publish_policy
from broker_schemas.broker.rollout_requests import (
    RolloutRequest,
    issue_requests,
    reissue_expired,
)
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from broker_schemas.errors import DataError, ServerUnavailable
from producers.metrics import ProducerMetrics
from producers.patience import FailureBrake, Patience
from producers.producer import Producer
from tests.builders.settings import lease_settings, producer_settings

OVER = lease_settings(lease_ms=-1, max_attempts=2)


class Backend:
    """Follows and generates as it is told to."""

    processor_fingerprint = "f"

    def __init__(self) -> None:
        self.policy_version = -1
        self.follow_error: Exception | None = None
        self.generate_error: Callable[[int], Exception | None] = lambda number: None
        self.num_follows = self.num_generated = 0

    def follow(self, policy: PublishedPolicy) -> None:
        self.num_follows += 1
        if self.follow_error is not None:
            raise self.follow_error
        self.policy_version = policy.policy_version

    def generate(self, samples: Any, seeds: Any, **_: Any) -> list[Any]:
        self.num_generated += 1
        if error := self.generate_error(self.num_generated):
            raise error
        return []

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that a producer makes, none of which is waited for; what it generates holds no record."""
    made: list[float] = []
    monkeypatch.setattr(Producer, "_wait", lambda self, pause_s: made.append(pause_s))
    monkeypatch.setattr("producers.producer.build_records", lambda *_, **__: [])
    return made


def a_producer(broker: Broker, backend: Backend, *, version_window: int = 2) -> Producer:
    return Producer(
        broker=broker,
        sink=SegmentSink(broker),
        backend=backend,  # type: ignore[arg-type]
        datasets={"train": [None] * 99},  # type: ignore[list-item]
        metrics=ProducerMetrics(CollectorRegistry()),
        settings=producer_settings(name="p", version_window=version_window, lease=OVER, deadline_s=0.01),
    )


def issue(broker: Broker, number: int) -> RolloutRequest:
    request = RolloutRequest(request_id=f"r-{number}", samples=((number, 1),), policy_version=0)
    assert issue_requests(broker, [request], cursor=number, next_cursor=number + 1, lease=OVER)
    return request


@pytest.mark.parametrize(
    "error",
    [
        DataError("policy folder p/v1: no *.safetensors"),
        OSError(errno.EIO, "input/output error", "p/v1"),
        ServerUnavailable("no rollout server answers"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_that_cannot_be_read_burn_no_rollout_and_write_no_flood(
    broker: Broker, pauses: list[float], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    # given a policy that nobody can read
    caplog.set_level(logging.INFO)
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="p")
    backend = Backend()
    backend.follow_error = error
    producer = a_producer(broker, backend)
    request = issue(broker, 0)
    # when it is tried twenty times, each time found waiting by the dispatcher
    for _ in range(20):
        assert producer.run(request) == []
        (found,) = reissue_expired(broker, OVER)
        assert (found.attempt, found.waits) == (1, True)
    # then nothing is rejected, the pauses grow, and two lines say it
    assert not read_status(broker, 1).by_reason("rejected")
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(pauses) == pauses[-1] == 30.0
    assert len(caplog.records) == 2
    # and once they can be read, it goes on at once
    backend.follow_error = None
    producer.run(request)
    assert backend.num_generated == 1
    assert sum("works again" in record.getMessage() for record in caplog.records) == 2


def test_the_weights_in_use_stay_while_they_are_fresh(broker: Broker, pauses: list[float]) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="p")
    backend = Backend()
    producer = a_producer(broker, backend, version_window=2)
    producer.run(issue(broker, 0))
    backend.follow_error = DataError("cannot be read")
    for version in (1, 2, 3):
        publish_policy(broker, policy_version=version, optimizer_step=version, weights_path="p")
        producer.run(issue(broker, version))
    # versions 1 and 2 leave version 0 in the window, 3 does not
    assert backend.num_generated == 3
    assert pauses == [0.5]
    assert backend.num_follows == 3  # the pause of the first failure spared the second try


def test_one_bad_request_is_its_own_fault_and_a_second_one_makes_it_the_place(
    broker: Broker, pauses: list[float]
) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="p")
    backend = Backend()
    backend.generate_error = lambda number: DataError("image gone.png cannot be read")
    producer = a_producer(broker, backend)
    first, second = issue(broker, 0), issue(broker, 1)
    for _ in range(3):  # as often as it is retried
        with pytest.raises(DataError):
            producer.run(first)
    assert producer.run(second) == []
    backend.generate_error = lambda number: None
    producer.run(second)
    backend.generate_error = lambda number: DataError("image gone.png cannot be read")
    with pytest.raises(DataError):
        producer.run(first)
    assert pauses == [0.5]


def test_a_wait_ends_when_the_worker_is_asked_to_stop(broker: Broker) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="p")
    backend = Backend()
    backend.follow_error = DataError("cannot be read")
    producer = a_producer(broker, backend)
    producer.is_stopping = lambda: True
    request = issue(broker, 0)
    for _ in range(8):  # a minute of pauses
        producer.run(request)
    assert backend.num_follows == 8


def test_the_dispatcher_slows_down_while_failures_are_the_rule_and_recovers() -> None:
    brake = FailureBrake()
    assert not brake.observe(100, 5, 0.0)
    assert brake.may_issue(0.0)
    assert not brake.observe(101, 6, 1.0)  # too few to tell
    assert brake.observe(102, 40, 2.0)  # most of these failed
    assert [brake.may_issue(at) for at in (2.1, 2.9, 3.0, 3.5, 4.0)] == [False, False, True, False, True]
    brake.observe(102, 60, 5.0)
    assert not brake.may_issue(6.9)
    assert brake.may_issue(7.0)
    assert brake.observe(130, 61, 8.0)
    assert all(brake.may_issue(8.0) for _ in range(5))


def test_patience_begins_anew_once_something_worked() -> None:
    patience = Patience()
    assert [patience.failed("a", is_accident=True) for _ in range(3)] == [0.5, 1.0, 2.0]
    patience.worked()
    assert patience.failed("a", is_accident=True) == 0.5
