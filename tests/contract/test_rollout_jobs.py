"""What a producer makes of an RQ job that somebody else wrote: nothing in it is ever executed."""

from __future__ import annotations

import json
import pickle
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rq.serializers import JSONSerializer

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.rollout_requests import RolloutRequest
from producers import jobs
from producers.jobs import (
    JOB_FUNCTION,
    RolloutJob,
    RolloutWorker,
    enqueue_request,
    failed_requests,
    rollout_queue,
)
from rollstream.history.gc import collect

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Poisoned:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@dataclass
class FakeProducer:
    """Notes what it was asked to run."""

    ran: list[str] = field(default_factory=list)

    def run(self, request: RolloutRequest) -> list[str]:
        self.ran.append(request.request_id)
        return ["ok"]


@pytest.fixture
def broker(real_broker: Broker) -> Iterator[Broker]:
    yield real_broker
    collect(real_broker.keys.run, real_broker)


def request_named(request_id: str) -> RolloutRequest:
    return RolloutRequest(request_id=request_id, samples=((0, 1),), policy_version=0)


def enqueue(broker: Broker, request_id: str, **changes: bytes) -> None:
    """Enqueue a rollout job, then write ``changes`` into its hash as anyone with access could."""
    queue = rollout_queue(broker.client, broker.keys.rollout_queue)
    enqueue_request(queue, request_named(request_id), attempt=1, job_timeout_s=60)
    if changes:
        broker.client.hset(f"rq:job:{request_id}", mapping=changes)  # type: ignore[arg-type]


def work(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run all jobs that wait; return the ids of the requests that reached the producer."""
    producer = FakeProducer()
    monkeypatch.setitem(jobs._PRODUCERS, "this", producer)  # type: ignore[arg-type]
    queue = rollout_queue(broker.client, broker.keys.rollout_queue)
    worker = RolloutWorker([queue], connection=broker.client, serializer=JSONSerializer, job_class=RolloutJob)
    worker.work(burst=True, logging_level="CRITICAL", with_scheduler=False)
    return producer.ran


_SEEN_HANDLERS: list[object] = []


def test_a_worker_installs_its_own_signal_handlers(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    _SEEN_HANDLERS.append(signal.getsignal(signal.SIGTERM))
    work(broker, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is not _SEEN_HANDLERS[0]


def test_and_the_next_test_finds_those_of_before() -> None:
    assert all(signal.getsignal(signal.SIGTERM) is handler for handler in _SEEN_HANDLERS)


@pytest.mark.req("O-5", "Q-3")
def test_a_job_is_json_on_the_wire_and_reaches_the_producer(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue(broker, "j-1")
    raw: Any = broker.client.hget("rq:job:j-1", "data")

    function, instance, arguments, named = json.loads(zlib.decompress(raw))

    assert (function, instance, named) == (JOB_FUNCTION, None, {})
    assert RolloutRequest.from_spec(arguments[0]) == request_named("j-1")
    assert work(broker, monkeypatch) == ["j-1"]
    assert failed_requests(rollout_queue(broker.client, broker.keys.rollout_queue)) == []


@pytest.mark.req("Q-3", "Q-13", "O-5")
def test_a_pickled_job_fails_without_being_unpickled(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proof = tmp_path / "executed"
    poison = pickle.dumps(Poisoned(proof))
    data = pickle.dumps((JOB_FUNCTION, None, (Poisoned(proof),), {}))
    enqueue(broker, "j-bad", data=data, meta=poison, result=poison, exc_info=poison)
    enqueue(broker, "j-good")

    assert work(broker, monkeypatch) == ["j-good"]

    assert not proof.exists()
    ((request_id, _, reason),) = failed_requests(rollout_queue(broker.client, broker.keys.rollout_queue))
    assert request_id == "j-bad"
    assert reason


@pytest.mark.req("Q-13", "O-5")
@pytest.mark.parametrize("function", ["os.system", "pathlib.Path.touch", "producers.jobs.failed_requests"])
def test_a_job_that_names_another_function_fails_by_name_and_is_not_run(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str
) -> None:
    proof = tmp_path / "executed"
    arguments = [f"touch {proof}"] if function == "os.system" else [str(proof)]
    enqueue(broker, "j-bad", data=json.dumps([function, None, arguments, {}]).encode())

    assert work(broker, monkeypatch) == []

    assert not proof.exists()
    ((_, _, reason),) = failed_requests(rollout_queue(broker.client, broker.keys.rollout_queue))
    assert f"got function '{function}', expected {JOB_FUNCTION}" in reason


@pytest.mark.req("Q-13", "O-5")
def test_callbacks_and_webhooks_in_a_job_are_not_called(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(jobs, "failed_requests", lambda *_, **__: called.append("callback"))
    hostile = b"producers.jobs.failed_requests"
    webhooks = json.dumps([{"url": "http://127.0.0.1:9/", "events": ["finished", "failed"]}]).encode()
    for request_id, data in (("j-good", None), ("j-bad", b'["os.system", null, ["true"], {}]')):
        names = dict.fromkeys(("success_callback_name", "failure_callback_name"), hostile)
        changes = names | {"webhooks": webhooks} | ({"data": data} if data else {})
        enqueue(broker, request_id, **changes)

    assert work(broker, monkeypatch) == ["j-good"]

    assert called == []
    assert all(
        not RolloutJob.fetch(name, broker.client, JSONSerializer).webhooks for name in ("j-good", "j-bad")
    )


@pytest.mark.req("Q-13", "O-5")
@pytest.mark.parametrize("data", [b"", b"\x80", b"[]", b"{}", b'["a"]', b"null", b"x\x9c\xff", bytes(200)])
def test_bytes_that_are_no_job_fail_and_the_worker_goes_on(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    enqueue(broker, "j-bad", data=data)
    enqueue(broker, "j-good")

    assert work(broker, monkeypatch) == ["j-good"]


@pytest.mark.req("Q-13", "O-5")
@pytest.mark.parametrize("field", ["timeout", "status", "created_at", "retries_left", "result_ttl", "origin"])
def test_fields_that_cannot_be_leave_the_job_out_and_the_worker_goes_on(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    enqueue(broker, "j-bad", **{field: b"\xff?"})
    enqueue(broker, "j-good")

    assert "j-good" in work(broker, monkeypatch)
