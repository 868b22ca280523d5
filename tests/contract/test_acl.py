"""The ACL file on a real server: each role can do its whole job, and nothing outside it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from prometheus_client import CollectorRegistry
from rq.serializers import JSONSerializer

from broker_schemas.broker.broker import Broker, Fence
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.evaluation_rounds import (
    read_evaluation_state,
    read_results,
    settle_evaluation,
)
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.lease import Lease, SoleRole
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.packer_door import PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.broker.policy import publish_policy, read_policy
from broker_schemas.broker.rollout_requests import RolloutRequest, renew_lease, say_demand_advice
from broker_schemas.broker.run_identity import adopt_run, read_deciding, read_run
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from broker_schemas.errors import BrokerRefused
from broker_schemas.records.evaluation_state import EvaluationNumbers
from broker_schemas.records.identity import RunIdentity
from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.rollout_servers.server_lock import server_locks
from producers import jobs
from producers.dispatcher import Dispatcher
from producers.jobs import RolloutJob, RolloutWorker, failed_requests, rollout_queue
from producers.metrics import DispatcherMetrics
from rollstream.acl import ROLES, Role, acl_file, user_name
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_loss import find_loss, noted_cursor
from rollstream.history.audit import WholeLog, take_audit
from rollstream.history.gc import collect
from rollstream.watch.exporter import ExporterSettings, RunCollector
from tests.builders.records import a_rollout
from tests.builders.settings import claim_settings, dispatcher_settings, lease_settings
from tests.conftest import redis_server_program
from tests.contract.test_transitions import match_all
from tests.redis_servers import program_or_skip, running_server

RUN: Final = "guarded"
COARSE: Final = "before Redis 7 whoever may read a key may also write it"
SERVANTS: Final = [role for role in ROLES if role != "operator"]


def password(role: str) -> str:
    return f"secret of the {role}"


@dataclass(frozen=True)
class GuardedServer:
    """A server with the ACL file; ``is_fine`` where it knows selectors and read-only keys."""

    url: str
    is_fine: bool

    def open(self, role: Role, run: str = RUN) -> Broker:
        address = BrokerAddress(
            url=self.url, username=user_name(RUN, role), password=password(role), retries=0
        )
        return Broker.connect(run, address)


@pytest.fixture(params=["redis 6.2", "redis 7"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GuardedServer]:
    is_fine = request.param == "redis 7"
    program = program_or_skip(lowest=(7, 0)) if is_fine else redis_server_program() or program_or_skip()
    hashes = {role: hashlib.sha256(password(role).encode()).hexdigest() for role in ROLES}
    users = tmp_path / "users.acl"
    users.write_text(acl_file(RUN, hashes, has_selectors=is_fine), encoding="utf-8")
    arguments = ["--port", "0", "--aclfile", str(users)]
    with running_server(program, arguments, tmp_path / "redis.log") as socket:
        yield GuardedServer(f"unix://{socket}", is_fine)


@pytest.fixture
def brokers(server: GuardedServer) -> Iterator[dict[Role, Broker]]:
    opened = {role: server.open(role) for role in ROLES}
    yield opened
    for broker in opened.values():
        broker.close()


def produce(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all jobs as the producer's worker does: lease, policy, server lock, push; one of them fails."""

    class Producer:
        def run(self, request: RolloutRequest) -> list[str]:
            assert renew_lease(broker, request.request_id, lease_settings())
            assert read_policy(broker) is not None
            with server_locks(broker, wait_s=5)("http://127.0.0.1:1"):
                records = [a_rollout(name, request_id=request.request_id) for name in request.record_ids]
            statuses: list[str] = list(SegmentSink(broker).push(records))
            if request.optimizer_step >= 0:
                raise ValueError("a job that fails")
            return statuses

    monkeypatch.setitem(jobs._PRODUCERS, "this", Producer())  # type: ignore[arg-type]
    queue = rollout_queue(broker.client, broker.keys.rollout_queue)
    worker = RolloutWorker([queue], connection=broker.client, serializer=JSONSerializer, job_class=RolloutJob)
    worker.work(burst=True, logging_level="CRITICAL", with_scheduler=False)


def a_pack(item: PendingDescriptor) -> PlannedPack:
    descriptor = item.descriptor
    pack = ReadyPack(
        pack_id=f"p-{descriptor.record_id}",
        record_ids=(descriptor.record_id,),
        lengths=(descriptor.encoded_length,),
        policy_version=0,
        fill=0.5,
    )
    return PlannedPack(rank=0, pack=pack, entry_ids=(item.entry_id,))


def dispatcher_of(broker: Broker) -> Dispatcher:
    return Dispatcher(
        broker,
        rollout_queue(broker.client, broker.keys.rollout_queue),
        DispatcherMetrics(CollectorRegistry()),
        dispatcher_settings(
            world_size=1, num_samples=8, seed=1, request_size=2, demand=None, capacity_tokens=64
        ),
    )


def pack_all_but_one(broker: Broker) -> None:
    """Do all that a packer does: take over, read, drop, commit, look."""
    packer = PackerDoor(broker)
    assert packer.found_again(0.0, count=9, held=()) == []
    held = packer.read(count=9, block_ms=1)
    assert len(held) == 4
    assert packer.drop([(held[0].entry_id, held[0].descriptor.record_id)], reason="stale") == 1
    status = read_status(broker, 1)
    assert status.open_step is not None
    planned = [a_pack(item) for item in held[1:]]
    assert packer.commit(planned, oldest_policy_version=0, queue_limit=0, sealed_step=0).num_packs == 3
    assert packer.ready_depths(1) == [3]


def packs_to_come(learner: LearnerDoor) -> tuple[ReadyPack, ...]:
    fetched = learner.fetch_coming(0, optimizer_step=0, policy_version=0)
    return tuple(pack for pack, _ in fetched)


def take_step(learner: LearnerDoor) -> StepClaim:
    claim = learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert len(learner.fetch_segments(claim.record_ids)) == claim.num_segments
    gone = Untrainable(record_id=claim.record_ids[0], reason="quarantined_image", detail="gone")
    learner.quarantine(optimizer_step=0, segments=[gone])
    learner.commit_step(optimizer_step=0, summary={"loss": 1.0})
    return claim


def look_around(brokers: dict[Role, Broker], learner: LearnerDoor) -> None:
    """Ask what roles ask beside the way of a rollout: the learner's log, rounds of evaluation, advice."""
    assert learner.queue_status().total("committed_steps") == 1
    assert learner.evaluations(beyond_step=-1) == []
    roles: tuple[Role, ...] = ("dispatcher", "evaluator")
    for role in roles:
        assert read_evaluation_state(brokers[role]).num_asked == 0
    assert read_results(brokers["evaluator"], after="0-0") == []
    numbers = EvaluationNumbers(optimizer_step=1, policy_version=1, highest_policy_version=1, metrics={})
    assert settle_evaluation(brokers["evaluator"], numbers, num_results=0, entry_ids=["1-1"])
    say_demand_advice(brokers["dispatcher"], "ask for more")
    assert [item.optimizer_step for item in learner.evaluations(beyond_step=0)] == [1]


@pytest.mark.req("Q-1", "O-5")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_role_does_its_whole_job_with_its_own_user(
    brokers: dict[Role, Broker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Given one user a role, when one step goes round from its opening to its archive."""
    learner = LearnerDoor(
        brokers["learner"],
        claim_settings(world_size=1, mode="sealed", num_rollouts=4, archived_only=True),
    )
    learner.publish_policy(policy_version=0, optimizer_step=0, weights_path="/w")
    assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) is None
    assert dispatcher_of(brokers["dispatcher"]).step(time.monotonic()) == 4
    produce(brokers["producer"], monkeypatch)
    asker = brokers["dispatcher"]
    assert len(failed_requests(rollout_queue(asker.client, asker.keys.rollout_queue))) == 2
    assert dispatcher_of(brokers["dispatcher"]).step(time.monotonic()) == 0
    matcher = MatcherDoor(brokers["matcher"], "m-0")
    assert matcher.found_again(0.0, count=9) == []
    assert read_policy(brokers["matcher"]) is not None
    match_all(brokers["matcher"])
    pack_all_but_one(brokers["packer"])
    assert read_policy(brokers["packer"]) is not None

    in_order = LearnerDoor(brokers["learner"], claim_settings(world_size=1, packs_per_rank=3))
    coming = packs_to_come(learner)
    assert coming == packs_to_come(in_order)
    assert coming == take_step(learner).packs[0]
    with server_locks(brokers["learner"], wait_s=5)("http://127.0.0.1:1"):
        pass
    look_around(brokers, learner)
    archive = ArchiveWriter(brokers["archive"], tmp_path / "archive")
    assert archive.step(block_ms=1) > 5
    archive.close()
    assert find_loss(brokers["archive"], archive.cursor, "0-0") is None
    assert noted_cursor(brokers["archive"]) == archive.cursor
    learner.settle_checkpoint(optimizer_step=1)
    assert read_status(brokers["operator"], 1).open_claims == 0
    settings = ExporterSettings(
        queue_limit=8, world_size=1, version_window=2, budget_bytes=1, max_steps=9, b_ratio=1.0
    )
    names = {family.name for family in RunCollector(brokers["exporter"], settings).collect()}
    assert "rollstream_broker_memory_bytes" in names

    audit = take_audit(WholeLog(tmp_path / "archive", brokers["operator"]), counters=None)
    assert audit.balanced, audit.faults
    assert brokers["operator"].client.config_get("appendfsync")
    assert collect(RUN, brokers["operator"]) > 0


@pytest.mark.req("Q-18", "Q-19")
def test_every_role_finds_the_runs_identity_and_holds_its_own_place_only(
    brokers: dict[Role, Broker], tmp_path: Path
) -> None:
    identity = RunIdentity(run_id="a", deciding={"run.seed": "1"}, settings={})
    adopt_run(brokers["learner"], identity, tmp_path, optimizer_step=0)
    places: tuple[SoleRole, ...] = ("learner", "packer", "dispatcher", "archive", "evaluator")
    for role in places:
        lease = Lease.take(brokers[role], role)
        lease.keep()
        fenced = brokers[role].fenced(Fence(role=role, token=lease.token))
        Lease(fenced, role, lease.token, 1000).keep()
    for servant in SERVANTS:
        assert read_deciding(brokers[servant]) == {"run.seed": "1"}
        assert read_run(brokers[servant]) is not None
    for role in ("producer", "matcher", "exporter"):
        with pytest.raises(BrokerRefused):
            Lease.take(brokers[role], "learner")


def raw(broker: Broker, *command: str) -> Any:
    return broker.client.execute_command(*command)


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("role", SERVANTS)
def test_no_role_can_touch_the_server_or_another_run(brokers: dict[Role, Broker], role: Role) -> None:
    broker, theirs = brokers[role], "{rollstream:other}:"
    commands = [
        *(("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "save", "")),
        *(("KEYS", "*"), ("SCAN", "0"), ("SHUTDOWN",), ("ACL", "LIST")),
        *(("EVAL", "return redis.call('FLUSHALL')", "0"), ("MODULE", "LIST"), ("MONITOR",)),
        *(("SCRIPT", "FLUSH"), ("CLIENT", "KILL", "ID", "1"), ("SAVE",), ("SWAPDB", "0", "1")),
        *(("XADD", f"{theirs}segments", "*", "a", "b"), ("GET", f"{theirs}payload:a"), ("DEL", "other")),
        ("EVAL", f"return redis.call('DEL', '{theirs}policy')", "0"),
        ("PUBLISH", "elsewhere", "x"),
    ]
    for command in commands:
        with pytest.raises((redis.exceptions.NoPermissionError, redis.exceptions.ResponseError)) as caught:
            raw(broker, *command)
        assert re.search("no permissions|NOPERM|can't run this command|can't access", str(caught.value)), (
            command
        )


@pytest.mark.req("Q-1", "Q-20")
@pytest.mark.parametrize("role", [role for role in SERVANTS if role != "exporter"])
def test_nobody_can_take_the_log_or_its_sums_away(
    server: GuardedServer, brokers: dict[Role, Broker], role: Role
) -> None:
    if not server.is_fine:
        pytest.skip(COARSE)
    broker, operator = brokers[role], brokers["operator"].client
    events, counters = broker.keys.named("events"), broker.keys.named("counters")
    operator.xadd(events, {"type": "kept"}, id="9-1")
    operator.hset(counters, "pushed", 7)
    commands = [(name, key) for name in ("DEL", "UNLINK", "PERSIST", "GETDEL") for key in (events, counters)]
    more = [
        *(("RENAME", events, broker.keys.named("body:x")), ("RENAME", counters, broker.keys.named("made:x"))),
        *(("SET", events, "x"), ("MSET", counters, "x"), ("EXPIRE", events, "1"), ("XDEL", events, "9-1")),
        *(("XGROUP", "CREATE", events, "mine", "0"), ("SMOVE", counters, events, "x")),
    ]
    if role not in ("learner", "archive"):  # who bounds the log
        more.append(("XTRIM", events, "MAXLEN", "0"))
    for command in [*commands, *more]:
        with pytest.raises(redis.exceptions.NoPermissionError):
            raw(broker, *command)
        arguments = ", ".join(f"'{word}'" for word in command)
        with pytest.raises(redis.exceptions.ResponseError, match="permission|can't"):
            raw(broker, "EVAL", f"return redis.call({arguments})", "0")
    assert (operator.xlen(events), operator.hget(counters, "pushed")) == (1, b"7")


def refused(broker: Broker, script: str, named_keys: list[str], arguments: list[Any]) -> None:
    with pytest.raises(BrokerRefused, match="this user may not do that"):
        broker.run(script, named_keys, arguments)


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("role", [role for role in SERVANTS if role != "learner"])
def test_only_the_learner_claims_and_settles_steps(
    server: GuardedServer, brokers: dict[Role, Broker], role: Role
) -> None:
    if not server.is_fine and role == "packer":
        pytest.skip(COARSE)
    refused(
        brokers[role], "claim_step", ["claims", "claim:0", "sealed"], [0, "A", 1, 1, 0, 0, "fallback", -1]
    )
    refused(brokers[role], "settle_checkpoint", ["claims", "archive"], [1, 0, 1])
    refused(brokers[role], "commit_step", ["claim:0"], [0, b"\x80"])
    assert not brokers["operator"].client.exists(brokers[role].keys.named("claim:0"))


@pytest.mark.req("Q-1", "V-2")
@pytest.mark.parametrize("role", [role for role in SERVANTS if role != "learner"])
def test_only_the_learner_publishes_a_policy(
    server: GuardedServer, brokers: dict[Role, Broker], role: Role
) -> None:
    if not server.is_fine and role in ("producer", "dispatcher", "packer", "evaluator"):
        pytest.skip(COARSE)
    with pytest.raises(BrokerRefused, match="this user may not do that"):
        publish_policy(brokers[role], policy_version=9, optimizer_step=9, weights_path="/evil")
    with pytest.raises(redis.exceptions.ResponseError):
        raw(brokers[role], "HSET", brokers[role].keys.named("policy"), "weights_path", "/evil")
    assert read_policy(brokers["operator"]) is None


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("role", [role for role in SERVANTS if role != "producer"])
def test_only_a_producer_pushes_rollouts(brokers: dict[Role, Broker], role: Role) -> None:
    with pytest.raises(BrokerRefused, match="this user may not do that"):
        SegmentSink(brokers[role]).push([a_rollout("a")])
    assert read_status(brokers["operator"], 1).segments_waiting == 0


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("role", [role for role in SERVANTS if role not in ("producer", "dispatcher")])
def test_only_dispatcher_and_producer_reach_the_jobs(brokers: dict[Role, Broker], role: Role) -> None:
    for command in (("HSET", "rq:job:a", "data", "x"), ("RPUSH", "rq:queue:a", "x"), ("HGETALL", "rq:job:a")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            raw(brokers[role], *command)


def test_nobody_comes_in_without_a_name_or_with_a_wrong_password(server: GuardedServer) -> None:
    for username, secret in ((None, None), (user_name(RUN, "matcher"), "wrong"), ("default", "x")):
        address = BrokerAddress(url=server.url, username=username, password=secret, retries=0)
        with pytest.raises(BrokerRefused) as caught:
            Broker.connect(RUN, address)
        assert "password" in str(caught.value)
        assert "wrong" not in str(caught.value)
