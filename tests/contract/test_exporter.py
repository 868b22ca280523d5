"""The exporter on a live run: what it says is what the broker holds, also when the broker is away."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.policy import publish_policy
from rollstream.watch.exporter import ExporterSettings, RunCollector
from tests.builders.settings import claim_settings
from tests.contract.test_transitions import match_all, pack_all, push

SETTINGS = ExporterSettings(
    queue_limit=8, world_size=2, version_window=2, budget_bytes=1 << 20, max_steps=1, b_ratio=0.5
)


@pytest.fixture
def broker(real_broker: Broker) -> Broker:
    """A real server only: the exporter asks for its memory, of which fakeredis knows nothing."""
    return real_broker


def exporter(broker: Broker, settings: ExporterSettings = SETTINGS) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(RunCollector(broker, settings))
    list(registry.collect())  # it counts lag from its first look on
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"rollstream_{name}", labels)


def publish(broker: Broker, policy_version: int) -> None:
    publish_policy(broker, policy_version=policy_version, optimizer_step=policy_version, weights_path="w")


@pytest.mark.req("O-3")
def test_depth_streams_groups_and_sums_are_those_of_the_broker(broker: Broker) -> None:
    # given four rollouts: one packed for rank 1, two matched, one held by a matcher
    registry = exporter(broker)
    push(broker, "a")
    match_all(broker)
    pack_all(broker, [1])
    push(broker, "b", "c")
    match_all(broker)
    push(broker, "d", "a")
    MatcherDoor(broker, "matcher-0").read(count=10, block_ms=1)
    # then
    assert [value(registry, "ready_depth_packs", rank=rank) for rank in ("0", "1")] == [0, 1]
    assert value(registry, "stream_length_records", stream="matched") == 2
    assert value(registry, "stream_length_records", stream="segments") == 1
    assert value(registry, "group_pending_records", group="matcher") == 1
    assert value(registry, "group_lag_records", group="matcher") == 0
    assert value(registry, "group_lag_records", group="packer") == 2
    assert value(registry, "group_consumers", group="matcher") == 1
    assert value(registry, "rollouts_by_stage_total", stage="pushed") == 4
    assert value(registry, "rollouts_by_stage_total", stage="matched") == 3
    assert value(registry, "rollouts_by_stage_total", stage="packed") == 1
    assert value(registry, "duplicate_rollouts_total") == 1
    held = value(registry, "run_bytes")
    assert held is not None
    assert 0 < held < SETTINGS.budget_bytes
    assert value(registry, "run_budget_bytes") == SETTINGS.budget_bytes


@pytest.mark.req("O-3")
def test_an_entry_that_waits_has_an_age_and_an_empty_stream_has_none(broker: Broker) -> None:
    # given an entry that was written an hour ago
    registry = exporter(broker)
    seconds, _ = broker.client.time()
    broker.client.xadd(broker.keys.named("segments"), {"record_id": "old"}, id=f"{(seconds - 3600) * 1000}-0")
    # then
    age = value(registry, "oldest_waiting_seconds", stream="segments")
    assert age is not None
    assert 3600 <= age < 3660
    assert value(registry, "oldest_waiting_seconds", stream="ready") == 0


@pytest.mark.req("O-3", "Q-17")
def test_drops_and_skips_and_rejections_are_told_by_reason_from_zero_on(broker: Broker) -> None:
    # given
    registry = exporter(broker)
    assert value(registry, "dropped_rollouts_total", reason="overflow") == 0
    assert value(registry, "rejected_rollouts_total", reason="malformed") == 0
    push(broker, "a", "b", "c")
    match_all(broker)
    # when a queue of one pack overflows twice
    pack_all(broker, [0, 0, 0], queue_limit=1)
    # then
    assert value(registry, "dropped_rollouts_total", reason="overflow") == 2


@pytest.mark.req("O-3", "Q-5")
def test_lag_is_told_when_generated_when_packed_and_when_claimed(broker: Broker) -> None:
    # given a rollout of version 3 that arrives under version 4, is packed under 5 and claimed at 6
    publish(broker, 3)
    registry = exporter(broker)
    publish(broker, 4)
    push(broker, "a", version=3)
    match_all(broker)
    publish(broker, 5)
    pack_all(broker, [0])
    publish(broker, 6)
    door = LearnerDoor(broker, claim_settings(world_size=1, version_window=9))
    assert door.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=6) is not None
    # then
    for stage, lag in {"generated": 1, "packed": 2, "claimed": 3}.items():
        assert value(registry, "lag_versions_sum", stage=stage) == lag
        assert value(registry, "lag_versions_count", stage=stage) == 1
        assert value(registry, "lag_versions_bucket", stage=stage, le=str(float(lag))) == 1
        assert value(registry, "lag_versions_bucket", stage=stage, le=str(float(lag - 1))) == 0
    # and a second scrape counts nothing twice
    assert value(registry, "lag_versions_count", stage="claimed") == 1
    assert value(registry, "policy_version") == 6


@pytest.mark.req("O-3")
def test_no_rank_is_expected_once_all_steps_are_committed(broker: Broker) -> None:
    # given
    registry = exporter(broker)
    assert value(registry, "expected_ranks") == 2
    # when
    door = LearnerDoor(broker, claim_settings(world_size=2))
    door.claim_step(optimizer_step=0, scheduled_kind="A", policy_version=0)
    door.commit_step(optimizer_step=0, summary={})
    # then
    assert value(registry, "expected_ranks") == 0
    assert value(registry, "decided_steps_total", kind="A") == 1
    assert value(registry, "committed_steps_total") == 1


@pytest.mark.req("O-3")
def test_a_broker_that_is_away_is_told_and_its_return_too(broker: Broker) -> None:
    # given an exporter whose broker is not there
    address = BrokerAddress(url="unix:///nowhere/redis.sock", retries=0)
    away = Broker(open_redis(address, socket_timeout_s=1.0), RunKeys("away"), address)
    collector = RunCollector(away, SETTINGS)
    registry = CollectorRegistry()
    registry.register(collector)
    # then it answers with what it knows
    assert value(registry, "broker_up") == 0
    assert value(registry, "run_budget_bytes") == SETTINGS.budget_bytes
    assert value(registry, "ready_depth_packs", rank="0") is None
    # and with a broker that is there, before any role made its groups
    there = Broker(broker.client, RunKeys(f"{broker.keys.run}-fresh"))
    assert value(exporter(there), "broker_up") == 1
    away.close()
