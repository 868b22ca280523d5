"""The examples of docs/examples do what they say, on a real server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import redis
import torch

from broker_schemas import client
from broker_schemas.broker import payloads
from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.policy import publish_policy, read_policy
from broker_schemas.broker.status import read_status
from broker_schemas.client import PackFeed
from broker_schemas.errors import ConfigError, DeadlinePassed, RunStopped
from broker_schemas.records.records import MatchedSegment, SegmentRecord
from broker_schemas.torch_dataset import PackDataset
from rollstream.history.audit import take_audit
from tests.contract.test_transitions import match_all, pack_all

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.req("Q-3", "Q-4")
def test_a_sampler_pushes_rollouts_of_the_current_policy_once(real_broker: Broker) -> None:
    publish_policy(real_broker, policy_version=3, optimizer_step=2, weights_path="/w")
    example = load_example("push_from_sampler")

    assert example.push_rollouts(real_broker, 20) == {"ok": 20}
    assert example.push_rollouts(real_broker, 20) == {"duplicate": 20}

    entries = MatcherDoor(real_broker, "m-0").read(count=100, block_ms=1)
    records = [SegmentRecord.decode_body(entry.body, entry.schema_version) for entry in entries]
    assert [record.record_id for record in records] == [f"sampler-3-{index}" for index in range(20)]
    assert {record.policy_version for record in records} == {3}
    np.testing.assert_array_equal(records[0].response_token_ids, np.arange(40, 60))


@pytest.mark.req("Q-8", "Q-10", "Q-14")
def test_a_plain_loop_trains_from_packs_and_everything_is_accounted_for(
    real_broker: Broker, tmp_path: Path
) -> None:
    """Given twelve rollouts in packs of one, when it takes three steps of two packs, half is trained."""
    load_example("push_from_sampler").push_rollouts(real_broker, 12)
    match_all(real_broker)
    pack_all(real_broker, [0] * 12, queue_limit=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))

    losses = load_example("train_from_packs").train(
        real_broker, model, tmp_path / "checkpoint.pt", num_steps=3
    )

    assert len(losses) == 3
    assert losses[2] < losses[0]
    status = read_status(real_broker, 1)
    assert (status.ready_depths, status.open_claims) == ((6,), 0)
    audit = take_audit(read_events(real_broker), counters=dict(status.counters))
    assert audit.balanced, audit.faults
    assert (audit.trained, audit.in_flight["packed"]) == (6, 6)
    policy = read_policy(real_broker)
    assert policy is not None
    assert policy.policy_version == 3


@pytest.mark.req("Q-10", "Q-14")
def test_the_example_killed_at_any_point_goes_on_and_ends_as_an_unbroken_run(
    redis_url: str, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a death before and after each thing it does in a step, when it is started again each time."""
    broken_weights, unbroken_weights = tmp_path / "broken.pt", tmp_path / "unbroken.pt"
    deaths = 0
    for name, path in ((f"{run_name}-a", unbroken_weights), (f"{run_name}-b", broken_weights)):
        broker = Broker.connect(name, BrokerAddress(url=redis_url))
        load_example("push_from_sampler").push_rollouts(broker, 12)
        match_all(broker)
        pack_all(broker, [0] * 12, queue_limit=0)
        fatal = iter(range(1, 99)) if path == broken_weights else iter(())
        at = next(fatal, 0)
        while True:
            example, calls = load_example("train_from_packs"), [0]

            def dying(call: Callable[..., Any], calls: list[int] = calls, at: int = at) -> Callable[..., Any]:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    calls[0] += 1
                    if calls[0] == at:
                        raise KeyboardInterrupt
                    done = call(*args, **kwargs)
                    calls[0] += 1
                    if calls[0] == at:
                        raise KeyboardInterrupt
                    return done

                return wrapped

            with monkeypatch.context() as patch:
                for what in ("next_step", "commit", "settle"):
                    patch.setattr(PackFeed, what, dying(getattr(PackFeed, what)))
                patch.setattr(example, "save", dying(example.save))
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))
                try:
                    example.train(broker, model, path, num_steps=3)
                    break
                except KeyboardInterrupt:
                    deaths += 1
                    at = next(fatal)
        audit = take_audit(read_events(broker), counters=dict(read_status(broker, 1).counters))
        assert audit.balanced, audit.faults
        assert (audit.trained, audit.steps["B"]) == (6, 3)
        broker.close()

    unbroken, broken = (torch.load(path, weights_only=True) for path in (unbroken_weights, broken_weights))
    assert deaths > 8
    assert broken["feed"] == unbroken["feed"]
    assert all(torch.equal(broken["model"][name], value) for name, value in unbroken["model"].items())


@pytest.mark.req("Q-4", "Q-10")
def test_a_feed_stops_where_the_broker_lost_its_last_claim_instead_of_training_it_again(
    real_broker: Broker,
) -> None:
    load_example("push_from_sampler").push_rollouts(real_broker, 4)
    match_all(real_broker)
    pack_all(real_broker, [0] * 4, queue_limit=0)
    feed = PackFeed(real_broker, deadline_s=5)
    feed.next_step()
    real_broker.client.delete(real_broker.keys.named("claim:0"))
    real_broker.client.zrem(real_broker.keys.named("claims"), "0")

    with pytest.raises(RunStopped, match="no longer knows its claim"):
        feed.next_step()
    with pytest.raises(RunStopped, match="no longer knows its claim"):
        feed.commit()


def test_a_feed_fetches_the_next_step_while_one_is_trained(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given three packs of one, the last of which goes away after it was looked at."""
    load_example("push_from_sampler").push_rollouts(real_broker, 3)
    match_all(real_broker)
    pack_all(real_broker, [0] * 3, queue_limit=0)
    asked: list[list[str]] = []

    def fetch(broker: Broker, names: list[str]) -> list[MatchedSegment]:
        asked.append(list(names))
        return payloads.fetch_segments(broker, names)

    monkeypatch.setattr(client, "fetch_segments", fetch)
    feed = PackFeed(real_broker, deadline_s=5)
    steps = []
    for _ in range(2):
        steps += feed.next_step()
        assert feed._ahead._thread is not None
        feed._ahead._thread.join()
    feed._ahead.take()
    steps += feed.next_step()

    assert [[segment.record_id for segment in segments] for _, segments in steps] == [
        list(pack.record_ids) for pack, _ in steps
    ]
    first, _, last = (list(pack.record_ids) for pack, _ in steps)
    assert asked == [first, [], last]


@pytest.mark.req("Q-8")
def test_the_feeds_of_several_ranks_take_parts_of_the_same_step(real_broker: Broker) -> None:
    load_example("push_from_sampler").push_rollouts(real_broker, 4)
    match_all(real_broker)
    pack_all(real_broker, [0, 1, 0, 1], queue_limit=0)
    feeds = [PackFeed(real_broker, world_size=2, rank=rank, deadline_s=5) for rank in range(2)]

    taken = [[pack.record_ids for pack, _ in feed.next_step()] for _ in range(2) for feed in reversed(feeds)]

    assert len({name for packs in taken for ids in packs for name in ids}) == 4
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        PackFeed(real_broker, world_size=2, rank=2)


@pytest.mark.req("Q-11")
def test_each_step_of_a_feed_has_its_deadline_also_where_the_broker_is_away(real_broker: Broker) -> None:
    feed = PackFeed(real_broker, deadline_s=0.05, poll_s=0.01)
    with pytest.raises(DeadlinePassed, match="optimizer step 0: waited 0.05 s for packs"):
        feed.next_step()

    away = redis.Redis.from_url("unix:///nowhere.sock", retry=None)
    feed = PackFeed(Broker(away, real_broker.keys), deadline_s=0.05, poll_s=0.01)
    for call in (feed.next_step, feed.commit, lambda: feed.settle(1)):
        with pytest.raises(DeadlinePassed, match="for the broker"):
            call()


def test_a_loader_with_workers_is_refused(real_broker: Broker) -> None:
    loader = torch.utils.data.DataLoader(
        PackDataset(PackFeed(real_broker)), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ConfigError, match="expected num_workers=0"):
        next(iter(loader))
