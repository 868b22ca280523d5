"""What a server must be before a run relies on it: one that keeps everything, and no cluster for jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, check_takes_jobs
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.keys import MATCHER_GROUP
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.broker.status import read_status
from broker_schemas.errors import BrokerError, BrokerFull, BrokerRefused, BrokerUnavailable
from producers.jobs import enqueue_request, rollout_queue
from rollstream.wiring import access
from tests.builders.configs import load_mapping, make_mapping, put
from tests.builders.records import a_segment
from tests.conftest import redis_server_program
from tests.contract.test_lost_replies import lose_reply
from tests.contract.test_transitions import a_learner, match_all, pack_all, push, ready_packs
from tests.redis_servers import program_or_skip, running_server


@pytest.mark.req("Q-12")
@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused_before_anything_starts(tmp_path: Path, policy: str) -> None:
    arguments = ["--port", "0", "--maxmemory", "100mb", "--maxmemory-policy", policy]
    with running_server(program_or_skip(), arguments, tmp_path / "log") as socket:
        with pytest.raises(BrokerRefused, match=f"got maxmemory-policy {policy}, expected noeviction"):
            Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        redis.Redis.from_url(f"unix://{socket}").config_set("maxmemory-policy", "noeviction")
        Broker.connect("demo", BrokerAddress(url=f"unix://{socket}")).close()


@pytest.mark.req("O-5", "Q-1")
def test_a_cluster_holds_a_run_but_its_jobs_need_a_server_of_their_own(
    tmp_path: Path, redis_url: str
) -> None:
    program = program_or_skip(lowest=(7, 0), needs=" for CLUSTER ADDSLOTSRANGE")
    with running_server(program, ["--port", "0", "--cluster-enabled", "yes"], tmp_path / "log") as socket:
        client = redis.Redis.from_url(f"unix://{socket}")
        with pytest.raises(BrokerUnavailable, match="does not take this now .*cluster that lacks nodes"):
            Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            client.ping()
        address = BrokerAddress(url=f"unix://{socket}")
        broker = Broker.connect("demo", address)
        request = RolloutRequest(request_id="r-1", samples=((0, 1),), policy_version=0)
        queue = rollout_queue(broker.client, broker.keys.rollout_queue)
        with pytest.raises(BrokerError, match="CROSSSLOT|slot"):
            enqueue_request(queue, request, attempt=1, job_timeout_s=60)
        with pytest.raises(BrokerRefused, match=r"it is a cluster.*broker\.jobs_url"):
            check_takes_jobs(broker.client, address)
        mapping = make_mapping()
        put(mapping, "broker.url", f"unix://{socket}")
        with pytest.raises(BrokerRefused, match=r"broker\.jobs_url"):
            access.open_jobs(load_mapping(tmp_path, mapping), broker)
        put(mapping, "broker.jobs_url", redis_url)
        jobs = access.open_jobs(load_mapping(tmp_path, mapping), broker)
        queue = rollout_queue(jobs, broker.keys.rollout_queue)
        enqueue_request(queue, request, attempt=1, job_timeout_s=60)
        assert queue.count == 1
        queue.delete(delete_jobs=True)


@pytest.mark.req("Q-12")
@pytest.mark.parametrize("program", [redis_server_program(), shutil.which("redis-server")])
def test_a_server_full_of_rollouts_alone_frees_itself(tmp_path: Path, program: str | None) -> None:
    if program is None:
        pytest.skip("one server alone here")
    with running_server(program, ["--port", "0"], tmp_path / "log") as socket:
        broker = Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
        names = [f"r-{number}" for number in range(40)]
        push(broker, *names)
        lose_reply(broker, "segments", MATCHER_GROUP, "matcher-0", 5)  # pending and found again at the limit
        broker.client.config_set("maxmemory", "1")
        broker.close()
        broker = Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))  # roles are started again too
        with pytest.raises(BrokerFull):
            push(broker, "late")
        learner = a_learner(broker, version_window=9)
        door = MatcherDoor(broker, "matcher-0")
        for entry in door.found_again(0.0, count=9):
            assert door.note_try(entry) == 1
            verdict = MatchVerdict(entry=entry, outcome="matched", segment=a_segment(entry.record_id, 20))
            assert door.commit([verdict], oldest_policy_version=0) == ["matched"]
        assert match_all(broker) == ["matched"] * 35
        pack_all(broker, [number % 2 for number in range(40)], queue_limit=40)
        for step in range(20):
            claim = learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)
            assert claim is not None
            assert len(learner.fetch_segments(claim.record_ids)) == 2
            learner.commit_step(optimizer_step=step, summary={"loss": 1.0})
        learner.settle_checkpoint(optimizer_step=20)
        status = read_status(broker, 2)
        assert (status.total("bytes"), status.total("trained_segments")) == (0, 40)
        assert not list(broker.client.scan_iter(broker.keys.prefix + "made:*"))
        broker.client.config_set("maxmemory", "0")
        assert push(broker, "late") == ["ok"]
        broker.close()


@pytest.mark.req("Q-12")
@pytest.mark.parametrize("program", [redis_server_program(), shutil.which("redis-server")])
def test_at_the_servers_own_limit_producers_wait_and_what_frees_memory_goes_on(
    tmp_path: Path, program: str | None
) -> None:
    if program is None:
        pytest.skip("one server alone here")
    with running_server(program, ["--port", "0"], tmp_path / "log") as socket:
        broker = Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
        ready_packs(broker, "a", "b", "c", "d", ranks=[0, 1, 0, 1])
        learner = a_learner(broker, version_window=9)
        broker.client.config_set("maxmemory", "1")
        with pytest.raises(BrokerFull):
            push(broker, "e")
        for step in (0, 1):
            claim = learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)
            assert claim is not None
            assert claim.kind == "B"
            learner.commit_step(optimizer_step=step, summary={"loss": 1.0})
        last = list(read_events(broker))[-1].event_id
        assert broker.run("advance_archive", ["archive"], [last, 1, "0-0"])[0] == 1
        learner.settle_checkpoint(optimizer_step=2)
        assert publish_policy(broker, policy_version=1, optimizer_step=2, weights_path="w")
        assert read_status(broker, 2).total("bytes") == 0
        broker.client.config_set("maxmemory", "0")
        assert push(broker, "e") == ["ok"]
        broker.close()
