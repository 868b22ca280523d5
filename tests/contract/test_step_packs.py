"""The packs of an on-policy step leave as they fill, and the claim takes them in the same order [S-8]."""

from __future__ import annotations

from functools import partial

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from consumers.metrics import PackerMetrics
from consumers.step_packer import StepPacker, StepPackerSettings
from consumers.step_plans import filled_packs, plan_step_budget
from producers.step_demand import rollouts_for_open_step
from tests.builders.records import a_rollout, a_segment
from tests.contract.test_transitions import a_learner

NUM_ROLLOUTS = 9
CAPACITY = 64


def a_packer(broker: Broker, num_ranks: int) -> StepPacker:
    return StepPacker(
        PackerDoor(broker),
        lambda _, lengths: plan_step_budget(lengths, CAPACITY, num_ranks=num_ranks),
        PackerMetrics(CollectorRegistry()),
        StepPackerSettings(world_size=num_ranks, capacity=CAPACITY, min_fill_ratio=0.65, block_ms=1),
        filled=partial(filled_packs, capacity=CAPACITY),
    )


def arrive(broker: Broker, *names: str) -> None:
    SegmentSink(broker).push([a_rollout(name, optimizer_step=0) for name in names])
    door = MatcherDoor(broker, "matcher-0")
    door.commit(
        [
            MatchVerdict(
                entry=entry,
                outcome="matched",
                segment=a_segment(entry.record_id, 20, optimizer_step=0),
            )
            for entry in door.read(count=100, block_ms=1)
        ],
        oldest_policy_version=0,
    )


def ask(learner: LearnerDoor) -> object:
    return learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)


@pytest.mark.req("S-8", "S-7", "Q-8")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_claim_begins_with_the_packs_that_left_before_it(broker: Broker, num_ranks: int) -> None:
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="/w", processor_fingerprint="")
    learner = a_learner(broker, world_size=num_ranks, mode="sealed", num_rollouts=NUM_ROLLOUTS)
    packer = a_packer(broker, num_ranks)
    assert ask(learner) is None
    assert learner.filled_packs(0) == [()] * num_ranks

    arrive(broker, *(f"r.{index}" for index in range(7)))
    while packer.step():
        pass
    filled = learner.filled_packs(0)
    assert [len(packs) for packs in filled] == ([2] if num_ranks == 1 else [1, 1])
    assert ask(learner) is None
    assert rollouts_for_open_step(read_status(broker, num_ranks)) == 2

    # a packer that was started again goes on where the other was
    packer = a_packer(broker, num_ranks)
    arrive(broker, "r.7", "r.8")
    for _ in range(2):  # what was pending first, then what is new
        packer.step()
    claim = learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)

    assert claim is not None
    assert claim.num_segments == NUM_ROLLOUTS
    for before, packs in zip(filled, claim.packs, strict=True):
        assert packs[: len(before)] == before
    counts = [len(packs) for packs in claim.packs]
    assert max(counts) - min(counts) <= 1
    assert learner.filled_packs(0) == [()] * num_ranks
