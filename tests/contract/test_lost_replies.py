"""Replies that get lost on their way: what was given is found again, by itself and without a restart."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.group_reader import IDLE_MS, LOOK_EVERY_S
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from consumers.metrics import PackerMetrics
from consumers.pack_buffer import PackBufferSettings
from consumers.step_packer import StepPacker, StepPackerSettings
from consumers.step_plans import plan_step_budget
from consumers.streaming_packer import StreamingPacker, StreamingPackerSettings
from tests.builders.records import a_rollout
from tests.contract.test_transitions import match_all, push


def lose_reply(broker: Broker, stream: str, group: str, consumer: str, count: int) -> None:
    """Let the server give entries to a consumer who never hears of it: redis-py then asks for the next."""
    broker.client.xreadgroup(group, consumer, {broker.keys.named(stream): ">"}, count=count)


def pending(broker: Broker, stream: str, group: str) -> int:
    facts: Any = broker.client.xpending(broker.keys.named(stream), group)
    return int(facts["pending"])


def a_streaming_packer(broker: Broker, places: int = 512) -> StreamingPacker:
    settings = StreamingPackerSettings(
        buffer=PackBufferSettings(
            capacity_tokens=40, packing_buffer=places, min_fill_ratio=0.5, method="exact"
        ),
        world_size=1,
        packs_per_rank=100,
        queue_limit=100,
        version_window=9,
        patience_s=0.0,
        block_ms=1,
    )
    return StreamingPacker(PackerDoor(broker), PackerMetrics(CollectorRegistry()), settings)


@pytest.mark.req("Q-4")
@pytest.mark.parametrize("places", [512, 3])
def test_a_packer_finds_what_a_lost_reply_gave_it_without_a_restart(broker: Broker, places: int) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
    packer, clock = a_streaming_packer(broker, places), itertools.count(1)
    packer.step(0.0)
    push(broker, *(f"a-{number}" for number in range(10)))
    match_all(broker)
    lose_reply(broker, "matched", PACKER_GROUP, "packer", 5)

    for _ in range(30):
        packer.step(float(next(clock)))

    assert read_status(broker, 1).total("packed_segments") == 10
    assert pending(broker, "matched", PACKER_GROUP) == 0


@pytest.mark.req("Q-4")
def test_a_packer_that_is_told_of_trouble_looks_at_once(broker: Broker) -> None:
    packer = a_streaming_packer(broker)
    packer.step(0.0)
    push(broker, "a")
    match_all(broker)
    lose_reply(broker, "matched", PACKER_GROUP, "packer", 1)
    packer.step(0.1)
    assert read_status(broker, 1).total("packed_segments") == 0
    packer._door.look_again()
    for moment in (0.2, 0.3):
        packer.step(moment)
    assert read_status(broker, 1).total("packed_segments") == 1


@pytest.mark.req("Q-4")
def test_a_step_packer_seals_a_step_whose_rollouts_a_lost_reply_took(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = itertools.count(step=LOOK_EVERY_S / 2)
    clock = SimpleNamespace(monotonic=lambda: float(next(moments)))
    monkeypatch.setattr("consumers.step_packer.time", clock)
    packer = StepPacker(
        PackerDoor(broker),
        lambda _, lengths: plan_step_budget(lengths, 64, num_ranks=1),
        PackerMetrics(CollectorRegistry()),
        StepPackerSettings(world_size=1, capacity=64, min_fill_ratio=0.5, block_ms=1),
    )
    broker.run("open_step", ["open_step", "matched"], [0, 0, 8])
    packer.step()
    SegmentSink(broker).push([a_rollout(f"a-{number}", optimizer_step=0) for number in range(8)])
    match_all(broker, optimizer_step=0)
    lose_reply(broker, "matched", PACKER_GROUP, "packer", 3)

    made = sum(packer.step() for _ in range(8))

    assert made > 0
    assert pending(broker, "matched", PACKER_GROUP) == 0


@pytest.mark.req("Q-4")
def test_a_living_matchers_lost_reply_is_found_in_its_next_round(broker: Broker) -> None:
    door = MatcherDoor(broker, "m-0")
    assert door.found_again(0.0, count=9) == []
    push(broker, "a", "b")
    lose_reply(broker, "segments", MATCHER_GROUP, "m-0", 2)
    assert not door.is_due(LOOK_EVERY_S - 0.1)
    assert door.is_due(LOOK_EVERY_S)
    assert [entry.record_id for entry in door.found_again(LOOK_EVERY_S, count=9)] == ["a", "b"]


@pytest.mark.req("Q-4")
def test_what_nobody_holds_any_more_is_found_again_within_15_seconds() -> None:
    assert IDLE_MS / 1000 + LOOK_EVERY_S <= 15


@pytest.mark.req("Q-4", "Q-13")
def test_entries_that_another_hand_deleted_are_let_go_of(real_broker: Broker) -> None:
    push(real_broker, "a")
    lose_reply(real_broker, "segments", MATCHER_GROUP, "m-0", 1)
    real_broker.client.xtrim(real_broker.keys.named("segments"), maxlen=0)
    assert MatcherDoor(real_broker, "m-0").found_again(0.0, count=9) == []
    assert pending(real_broker, "segments", MATCHER_GROUP) == 0


@pytest.mark.req("Q-12")
def test_consumers_that_hold_nothing_and_are_gone_are_forgotten(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker_schemas.broker.group_reader.REAP_IDLE_MS", -1)
    push(real_broker, "a")
    lose_reply(real_broker, "segments", MATCHER_GROUP, "holds-one", 1)
    for number in range(20):
        lose_reply(real_broker, "segments", MATCHER_GROUP, f"pod-{number}", 1)
    MatcherDoor(real_broker, "m-0").found_again(0.0, count=9)
    names: Any = real_broker.client.xinfo_consumers(real_broker.keys.named("segments"), MATCHER_GROUP)
    assert {b"holds-one"} <= {row["name"] for row in names} <= {b"holds-one", b"m-0"}


@pytest.mark.req("Q-4")
def test_a_group_that_the_broker_has_forgotten_is_made_again_and_the_loss_named(
    real_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    door, packer = MatcherDoor(real_broker, "m-0"), PackerDoor(real_broker)
    real_broker.client.delete(*(real_broker.keys.named(name) for name in ("segments", "matched")))
    assert door.read(count=1, block_ms=1) == []
    assert packer.found_again(0.0, count=1, held=()) == []
    assert "the broker lost what it held of this run" in caplog.text
    push(real_broker, "a")
    assert [entry.record_id for entry in door.read(count=1, block_ms=1)] == ["a"]
