"""`rollstream gc`: no key of the run stays, no other key goes; and a drained run costs next to nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.rollout_requests import issue_requests
from broker_schemas.errors import ConfigError
from producers.jobs import enqueue_request, rollout_queue
from rollstream.bench.queue_throughput import make_rollouts, measure_memory, push_match_and_pack, train
from rollstream.history.gc import collect, collect_run
from rollstream.run_lock import StackLock
from tests.builders.configs import make_mapping, write_file
from tests.builders.settings import lease_settings
from tests.contract.test_transitions import a_request, push


def fill(broker: Broker) -> None:
    """Leave something of every kind: requests, RQ jobs, streams, payloads, packs, a claim, dead letters."""
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=lease_settings())
    queue = rollout_queue(broker.client, broker.keys.rollout_queue)
    enqueue_request(queue, a_request(), attempt=1, job_timeout_s=60)
    enqueue_request(queue, a_request(2), attempt=2, job_timeout_s=60)
    for step in range(2):
        rollouts = make_rollouts(random.Random(step), 16, num_tokens=40, prefix=f"b{step}")
        push_match_and_pack(broker, rollouts)
        if step == 0:
            train(broker, 0)
    push(broker, "waiting")


@pytest.mark.req("Q-12")
def test_no_key_of_a_run_stays_and_none_of_another_goes(real_broker: Broker, redis_url: str) -> None:
    other = Broker.connect(real_broker.keys.run + "-other", BrokerAddress(url=redis_url))
    fill(real_broker)
    fill(other)
    before = set(real_broker.client.scan_iter("*"))

    num_keys = collect(real_broker.keys.run, real_broker)

    after = set(real_broker.client.scan_iter("*"))
    gone = before - after
    run = real_broker.keys.run.encode()
    assert num_keys == len(gone) > 20
    assert not [key for key in after if run + b"}" in key or run + b"-rollouts" in key]
    assert all(run + b"}" in key or run + b"-rollouts" in key or b"r-" in key for key in gone)
    assert after >= {key for key in before if run + b"-other" in key}
    assert f"rq:queue:{real_broker.keys.rollout_queue}".encode() not in real_broker.client.smembers(
        "rq:queues"
    )
    assert collect(real_broker.keys.run, real_broker) == 0
    collect(other.keys.run, other)
    other.close()


@pytest.fixture
def run_folder(real_broker: Broker, redis_url: str, tmp_path: Path) -> Path:
    path = tmp_path / real_broker.keys.run
    path.mkdir()
    mapping = make_mapping(run__name=real_broker.keys.run, broker__url=redis_url)
    write_file(path, mapping, "resolved.yaml")
    return path


def test_a_running_stack_is_not_robbed_of_its_queue_unless_forced(
    real_broker: Broker, run_folder: Path
) -> None:
    fill(real_broker)
    lock = StackLock.acquire(run_folder)
    with pytest.raises(ConfigError, match="--force"):
        collect_run(run_folder)
    assert real_broker.client.exists(real_broker.keys.named("counters"))

    assert collect_run(run_folder, force=True).num_keys > 10
    lock.release()


def test_a_stopped_broker_of_the_runs_own_loses_its_files(tmp_path: Path) -> None:
    run = tmp_path / "alone"
    (run / "redis").mkdir(parents=True)
    write_file(run, make_mapping(run__name="alone"), "resolved.yaml")
    (run / "redis" / "appendonly.aof").write_bytes(b"x" * 10)
    (run / "broker.json").write_text(json.dumps({"url": f"unix://{tmp_path}/nobody.sock"}))

    assert collect_run(run).num_file_bytes == 10
    assert not (run / "redis").exists()


@pytest.mark.req("Q-12")
def test_a_drained_run_leaves_less_than_five_megabytes(redis_url: str) -> None:
    report = measure_memory(redis_url, random.Random(0), num_records=2_000)

    num_bytes_passed = 2 * 4 * 1_950 * report.num_records
    assert report.left_bytes < 5_000_000 < num_bytes_passed
