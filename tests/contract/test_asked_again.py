"""What went stale is asked for again, once for each time, by whichever dispatcher comes first."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import read_cursor
from broker_schemas.broker.status import read_status
from broker_schemas.method.sampling import sample_at
from broker_schemas.records.events import LogEvent
from producers.asked_again import StaleRollout, stale_rollouts
from producers.broken_jobs import BrokenJobs
from producers.demand import DemandSettings
from producers.dispatcher import Dispatcher
from producers.jobs import rollout_queue
from producers.metrics import DispatcherMetrics
from rollstream.bench.queue_throughput import push_match_and_pack
from rollstream.history.gc import collect
from tests.builders.records import a_rollout
from tests.builders.settings import claim_settings, dispatcher_settings

NUM_SAMPLES, SEED = 50, 3
DEMAND = DemandSettings(
    world_size=1,
    gradient_accumulation_steps=1,
    prefetch_target_packs=1,
    version_window=2,
    sync_every_steps=1,
    b_ratio=Fraction(1),
    rollouts_per_request=4,
)


@pytest.fixture
def broker(real_broker: Broker) -> Iterator[Broker]:
    yield real_broker
    collect(real_broker.keys.run, real_broker)


def a_dispatcher(broker: Broker) -> tuple[Dispatcher, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = DispatcherMetrics(registry)
    settings = dispatcher_settings(
        world_size=1,
        num_samples=NUM_SAMPLES,
        seed=SEED,
        request_size=4,
        demand=DEMAND,
        capacity_tokens=100,
    )
    queue = rollout_queue(broker.client, broker.keys.rollout_queue, BrokenJobs(metrics))
    return Dispatcher(broker, queue, metrics, settings), registry


def requested(broker: Broker) -> dict[str, list[str]]:
    """Return the ids of all requests of the log, with their records."""
    events = [event for event in read_events(broker) if event.kind == "requested"]
    return {event.text("request_id"): event.ids() for event in events}


def make_stale(broker: Broker, policy_version: int) -> None:
    """Bring all open rollouts to the ready queue, and let a claim find them too old."""
    names = [name for names in requested(broker).values() for name in names]
    push_match_and_pack(broker, [a_rollout(name, request_id=name.rpartition(".")[0]) for name in names])
    publish_policy(broker, policy_version=policy_version, optimizer_step=policy_version, weights_path="w")
    door = LearnerDoor(broker, claim_settings(world_size=1, version_window=2))
    door.claim_step(optimizer_step=policy_version, scheduled_kind="A", policy_version=policy_version)


@pytest.mark.req("Q-16", "Q-14")
def test_the_samples_of_stale_rollouts_are_asked_for_again_before_new_ones(broker: Broker) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
    dispatcher, registry = a_dispatcher(broker)
    num_asked = dispatcher.step(0.0)
    make_stale(broker, 3)
    assert read_status(broker, 1).by_reason("dropped") == {"stale": num_asked}

    while dispatcher.step(0.1):
        pass

    def names(*attempts: tuple[int, int]) -> list[str]:
        return [f"{broker.keys.run}-{position:08d}-{attempt}" for position, attempt in attempts]

    again = [name for name in requested(broker) if name.endswith("-2")]
    assert again == names(*((position, 2) for position in range(len(again))))
    assert registry.get_sample_value("rollstream_rollouts_asked_again_total") == len(again) > 0
    assert read_cursor(broker) == num_asked, "none is asked for anew while some wait"

    # another dispatcher, started later, goes on where this one was
    make_stale(broker, 6)
    before = requested(broker)
    a_dispatcher(broker)[0].step(0.2)
    asked = [name for name in requested(broker) if name not in before]
    left = [(position, 2) for position in range(len(again), num_asked)]
    assert asked[: len(left) + 1] == names(*left, (0, 3))


def dropped(event_id: str, *names: str, reason: str = "stale") -> LogEvent:
    fields = {"ids": " ".join(names).encode(), "reason": reason.encode(), "stage": b"claim"}
    return LogEvent(event_id=event_id, kind="dropped", fields=fields)


def test_a_request_for_a_stale_rollout_names_its_sample_and_its_attempt() -> None:
    (found,) = stale_rollouts("a-1", [dropped("5-0", "a-1-00000008.3")], "")
    assert found == StaleRollout(position=11, attempt=1, place="5-0:1")
    request = found.request("a-1", num_samples=NUM_SAMPLES, seed=SEED, policy_version=7)
    assert request.record_ids == ("a-1-00000011-2.0",)
    assert request.samples[0][0] == sample_at(11, NUM_SAMPLES, SEED)
    (later,) = stale_rollouts("a-1", [dropped("9-0", *request.record_ids)], "")
    assert (later.position, later.attempt) == (11, 2)
    third = later.request("a-1", num_samples=NUM_SAMPLES, seed=SEED, policy_version=9)
    assert len({request.samples[0][1], third.samples[0][1]}) == 2
    assert not stale_rollouts("a-1", [dropped("12-0", *third.record_ids)], "")


def test_only_what_this_run_asked_for_and_what_is_not_asked_for_yet_counts() -> None:
    events = [
        dropped("3-0", "a-00000001.0"),
        dropped("10-0", "a-00000002.0", "a-00000003.0", "a-00000004.0"),
        dropped("10-1", "a-00000005.0", reason="overflow"),
        dropped("11-0", "b-00000006.0", "own-name", "a-00000007.0"),
    ]
    found = stale_rollouts("a", events, "10-0:2")
    assert [item.position for item in found] == [4, 7]
    assert len(stale_rollouts("a", events, "")) == 5
