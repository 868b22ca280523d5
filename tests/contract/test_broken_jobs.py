"""Entries of RQ's keys that are no job: passed over, counted, named once; nobody stops for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import RolloutRequest, renew_lease
from broker_schemas.broker.status import read_status
from broker_schemas.errors import BrokerRefused, BrokerUnavailable
from producers import jobs
from producers.broken_jobs import BrokenJobs
from producers.dispatcher import Dispatcher
from producers.jobs import RolloutJob, RolloutQueue, RolloutWorker, enqueue_request, rollout_queue
from producers.metrics import DispatcherMetrics
from rollstream.history.gc import collect
from tests.builders.settings import dispatcher_settings, lease_settings
from tests.contract.test_rollout_jobs import FakeProducer
from tests.redis_servers import program_or_skip, running_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NO_JOBS = [b"\xff\xfe", b"", b"a:b:c", b"no hash", b"no-such-job", b"x" * 100_000]


@pytest.fixture
def broker(real_broker: Broker) -> Iterator[Broker]:
    yield real_broker
    collect(real_broker.keys.run, real_broker)


class Counted:
    """Metrics that count what was passed over."""

    num_broken = 0

    def on_broken_job(self) -> None:
        self.num_broken += 1


@pytest.fixture
def broken() -> Counted:
    return Counted()


@pytest.fixture
def queue(broker: Broker, broken: Counted) -> RolloutQueue:
    return rollout_queue(broker.client, broker.keys.rollout_queue, BrokenJobs(broken))


def a_request(name: str = "r-1") -> RolloutRequest:
    return RolloutRequest(request_id=name, samples=((0, 1),), policy_version=0)


def a_worker(queue: RolloutQueue) -> RolloutWorker:
    return RolloutWorker(
        [queue], connection=queue.connection, serializer=JSONSerializer, job_class=RolloutJob
    )


def work(queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    producer = FakeProducer()
    monkeypatch.setitem(jobs._PRODUCERS, "this", producer)  # type: ignore[arg-type]
    a_worker(queue).work(burst=True, logging_level="CRITICAL", with_scheduler=False)
    return producer.ran


def a_dispatcher(broker: Broker, queue: RolloutQueue, *, lease_ms: int, max_attempts: int = 5) -> Dispatcher:
    settings = dispatcher_settings(
        world_size=1,
        num_samples=8,
        seed=0,
        request_size=1,
        demand=None,
        capacity_tokens=100,
        lease=lease_settings(lease_ms=lease_ms, max_attempts=max_attempts),
    )
    return Dispatcher(broker, queue, DispatcherMetrics(CollectorRegistry()), settings)


def open_step(broker: Broker, num_rollouts: int) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
    broker.run("open_step", ["open_step", "matched"], [0, 0, num_rollouts])


@pytest.mark.req("O-5", "Q-13")
@pytest.mark.parametrize("entry", NO_JOBS)
def test_a_queue_entry_that_is_no_job_is_passed_over_counted_and_named(
    queue: RolloutQueue,
    broken: Counted,
    entry: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue.connection.rpush(queue.key, entry)
    enqueue_request(queue, a_request(), attempt=1, job_timeout_s=60)

    with caplog.at_level(logging.ERROR):
        assert work(queue, monkeypatch) == ["r-1"]

    assert (broken.num_broken, queue.connection.llen(queue.intermediate_queue_key)) == (1, 0)
    assert "is passed over" in caplog.text


@pytest.mark.req("O-5", "Q-13")
def test_a_job_whose_keys_are_of_another_type_kills_nobody(
    queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("rq:job:r-0", "rq:executions:r-2"):
        queue.connection.set(key, "x")
    queue.connection.rpush(queue.key, "r-0")
    for name in ("r-2", "r-1", "r-0"):
        enqueue_request(queue, a_request(name), attempt=1, job_timeout_s=60)

    assert set(work(queue, monkeypatch)) == {"r-0", "r-1"}

    queue.connection.delete("rq:executions:r-2")


@pytest.mark.req("O-5", "Q-13")
@pytest.mark.parametrize("entry", [*NO_JOBS, b"r-1:\xff", b"\xff:r"])
def test_registries_with_entries_that_are_no_job_are_cleaned_and_nobody_stops(
    queue: RolloutQueue, entry: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = queue.connection
    for key in (FailedJobRegistry(queue=queue).key, StartedJobRegistry(queue=queue).key):
        client.zadd(key, {entry: 1 if key.startswith("rq:wip") else 4e9})
    client.rpush(queue.intermediate_queue_key, entry)
    enqueue_request(queue, a_request(), attempt=1, job_timeout_s=60)

    assert work(queue, monkeypatch) == ["r-1"]
    assert jobs.failed_requests(queue) == []

    assert client.zcard(FailedJobRegistry(queue=queue).key) == 0
    assert client.zcard(StartedJobRegistry(queue=queue).key) == 0
    assert client.llen(queue.intermediate_queue_key) == 0


@pytest.mark.req("O-5", "Q-13")
def test_a_dispatcher_goes_on_beside_a_failed_job_without_a_readable_hash(
    broker: Broker, queue: RolloutQueue
) -> None:
    for name in ("gone", "broken"):
        queue.connection.zadd(FailedJobRegistry(queue=queue).key, {name: 4e9})
    queue.connection.hset("rq:job:broken", "created_at", "never")
    open_step(broker, 2)

    assert a_dispatcher(broker, queue, lease_ms=1000).step(10.0) == 2

    queue.connection.delete("rq:job:broken")


@pytest.mark.req("O-5", "Q-4")
def test_more_jobs_may_fail_at_a_time_than_one_look_used_to_see(
    broker: Broker, queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_step(broker, 100)
    dispatcher = a_dispatcher(broker, queue, lease_ms=60_000)
    assert dispatcher.step(10.0) == 100
    queue.connection.delete(queue.key)
    for job_id in [f"{broker.keys.run}-{number:08d}" for number in range(100)]:
        queue.connection.hset(f"rq:job:{job_id}", "data", b"\x80")
        queue.connection.rpush(queue.key, job_id)
        queue.connection.hdel(f"rq:job:{job_id}", "retries_left")
    work(queue, monkeypatch)

    dispatcher.step(20.0)

    assert read_status(broker, 1).by_reason("rejected") == {"generation_failed": 100}


@pytest.mark.req("O-5", "Q-4")
def test_requests_that_only_wait_are_never_given_up_and_lost_jobs_are_enqueued_again(
    broker: Broker, queue: RolloutQueue
) -> None:
    open_step(broker, 8)
    dispatcher = a_dispatcher(broker, queue, lease_ms=1, max_attempts=1)
    dispatcher.step(10.0)
    assert len(queue.waiting_job_ids()) == 8
    for moment in range(11, 30):
        dispatcher.step(float(moment))
    status = read_status(broker, 1)
    assert (queue.count, status.by_reason("rejected"), status.total("reissued")) == (8, {}, 0)

    queue.connection.delete(queue.key)  # a crash between asking and enqueuing, or a hand in RQ's keys
    dispatcher.step(40.0)
    assert queue.count == 8

    queue.connection.lmove(queue.key, queue.intermediate_queue_key)  # taken by a worker that died at once
    for moment in (50.0, 60.0):
        dispatcher.step(moment)
    assert (queue.count, read_status(broker, 1).by_reason("rejected")) == (8, {})


@pytest.mark.req("O-5", "Q-4")
def test_a_worker_that_lets_go_without_a_word_costs_an_attempt(broker: Broker, queue: RolloutQueue) -> None:
    open_step(broker, 1)
    dispatcher = a_dispatcher(broker, queue, lease_ms=1, max_attempts=2)
    dispatcher.step(10.0)
    name = f"{broker.keys.run}-{0:08d}"
    for moment in (20.0, 30.0):
        assert renew_lease(broker, name, lease_settings(lease_ms=-1))
        dispatcher.step(moment)
    assert read_status(broker, 1).by_reason("rejected") == {"abandoned": 1}


@pytest.mark.req("O-5", "N-2")
def test_a_worker_killed_in_a_job_comes_back_under_the_same_name_at_once(
    broker: Broker, queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def killed(self: RolloutWorker, **_: object) -> bool:
        self.register_birth()
        names.append(self.name)
        return False

    monkeypatch.setattr(RolloutWorker, "work", killed)
    producer = FakeProducer()
    producer.settings = type("Settings", (), {"name": "host-1", "job_timeout_s": 9})  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(BrokerUnavailable, match="ended by itself"):
            RolloutWorker.work_for(producer, broker.client, queue.name)  # type: ignore[arg-type]
    assert len(set(names)) == 3
    assert all(name.startswith("host-1-") for name in names)


@pytest.mark.req("Q-12", "O-5")
def test_a_worker_waits_out_a_server_that_takes_no_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a server at its memory limit when the worker begins, and again while its first job runs."""
    with running_server(program_or_skip(), ["--port", "0"], tmp_path / "log") as socket:
        broker = Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        queue = rollout_queue(broker.client, broker.keys.rollout_queue)
        enqueue_request(queue, a_request("r-1"), attempt=1, job_timeout_s=60)
        enqueue_request(queue, a_request("r-2"), attempt=1, job_timeout_s=60)

        def fill_for_a_while() -> None:
            broker.client.config_set("maxmemory", "1")
            threading.Timer(0.3, broker.client.config_set, ("maxmemory", "0")).start()

        class FillingProducer(FakeProducer):
            def run(self, request: RolloutRequest) -> list[str]:
                fill_for_a_while()
                return super().run(request)

        producer = FillingProducer()
        monkeypatch.setitem(jobs._PRODUCERS, "this", producer)  # type: ignore[arg-type]
        fill_for_a_while()
        a_worker(queue).work(burst=True, logging_level="CRITICAL", with_scheduler=False)

        assert producer.ran == ["r-1", "r-2"]
        broker.close()


@pytest.mark.req("O-5", "Q-4")
def test_a_worker_whose_connection_is_reset_while_it_begins_takes_its_job(
    queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset: list[str] = []

    def once(name: str, act: Any) -> Any:
        def acting(*words: Any, **named: Any) -> Any:
            if name not in reset and (name != "hset" or words[1:2] == ("state",)):
                reset.append(name)
                raise redis.exceptions.ConnectionError("reset by peer")
            return act(*words, **named)

        return acting

    enqueue_request(queue, a_request("r-1"), attempt=1, job_timeout_s=60)
    for name in ("pubsub", "hset"):
        monkeypatch.setattr(queue.connection, name, once(name, getattr(queue.connection, name)))
    producer = FakeProducer()
    monkeypatch.setitem(jobs._PRODUCERS, "this", producer)  # type: ignore[arg-type]

    a_worker(queue).work(burst=True, logging_level="CRITICAL", with_scheduler=False)

    assert (reset, producer.ran) == (["pubsub", "hset"], ["r-1"])


@pytest.mark.req("Q-1")
def test_a_worker_without_its_rights_ends_and_says_so(
    queue: RolloutQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise redis.exceptions.NoPermissionError("this user has no permissions to run the 'lmove' command")

    monkeypatch.setattr(RolloutQueue, "dequeue_any", refused)
    producer = FakeProducer()
    producer.settings = type("Settings", (), {"name": "host-1", "job_timeout_s": 9})  # type: ignore[attr-defined]

    with pytest.raises(BrokerRefused, match="'lmove'"):
        RolloutWorker.work_for(producer, queue.connection, queue.name)  # type: ignore[arg-type]
