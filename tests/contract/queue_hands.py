"""What the consumers of the queue's model hold, and how a stream gives it to them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.packer_door import PendingDescriptor, PlannedPack
from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack, Untrainable
from broker_schemas.records.records import MatchedSegment
from tests.builders.records import a_segment
from tests.builders.settings import claim_settings
from tests.contract.queue_model import WORLD_SIZE, ModelPack, QueueModel

# how often each command comes, so that rollouts get as far as being trained and settled
COMMANDS = {
    "issue": 4, "reissue": 3, "renew": 3, "fail": 1,
    "push": 8, "push_into_a_full_broker": 1, "add_past_the_script": 1,
    "matcher_reads": 8, "matcher_takes_over": 2, "matcher_crashes": 2, "matcher_commits": 10,
    "packer_reads": 8, "packer_takes_over": 2, "packer_crashes": 2, "packer_commits": 10, "packer_drops": 1,
    "claim": 9, "commit_step": 5, "quarantine": 2, "settle": 2, "publish": 1,
}  # fmt: skip
WEIGHTED = tuple(name for name, weight in COMMANDS.items() for _ in range(weight))


def segment_named(name: str, policy_version: int) -> MatchedSegment:
    return a_segment(name, 20 + len(name) % 7, policy_version=policy_version)


def busiest(rng: random.Random, hands: dict[str, dict[str, Any]]) -> str:
    """Return the consumer that holds most, or any."""
    return rng.choice([max(hands, key=lambda name: len(hands[name])), *hands])


def still_useful(hand: dict[str, Any], stream: dict[str, str | None]) -> dict[str, Any]:
    """Return what is held and still there, and a little of what is gone."""
    gone = [name for name in hand if name not in stream][-4:]
    return {name: item for name, item in hand.items() if name in stream or name in gone}


def take(stream: dict[str, str | None], consumer: str, count: int) -> list[str]:
    """Give the next ``count`` unread entries to ``consumer``."""
    found = [name for name, owner in stream.items() if owner is None][:count]
    stream.update(dict.fromkeys(found, consumer))
    return found


def take_over(stream: dict[str, str | None], consumer: str) -> list[str]:
    """Give all entries that anyone holds to ``consumer``."""
    found = [name for name, owner in stream.items() if owner is not None]
    stream.update(dict.fromkeys(found, consumer))
    return found


def packs_to_come(door: LearnerDoor, step: int, policy_version: int) -> list[tuple[ReadyPack, ...]]:
    """Return what each rank is shown of a coming step before it is claimed."""
    shown = [
        door.fetch_coming(rank, optimizer_step=step, policy_version=policy_version)
        for rank in range(WORLD_SIZE)
    ]
    return [tuple(pack for pack, _ in fetched) for fetched in shown]


def planned_pack(pack: ModelPack, members: list[PendingDescriptor]) -> PlannedPack:
    return PlannedPack(
        rank=pack.rank,
        pack=ReadyPack(
            pack_id=pack.pack_id,
            record_ids=pack.ids,
            lengths=tuple(item.descriptor.encoded_length for item in members),
            policy_version=pack.policy_version,
            fill=0.5,
        ),
        entry_ids=tuple(item.entry_id for item in members),
    )


def until_empty(look: Callable[[], list[str]]) -> list[str]:
    """Return what ``look`` finds until it finds nothing."""
    found: list[str] = []
    while more := look():
        found += more
    return found


def quarantine_some(rng: random.Random, broker: Broker, model: QueueModel) -> None:
    """Take some of a claim out of it, now and then some that are not in it, or one twice."""
    step = rng.choice([*model.claims, rng.randint(0, model.next_step)])
    known = model.claims[step].ids if step in model.claims else []
    chosen = rng.sample(known, min(len(known), rng.randint(0, 2))) + ["nobody"] * (rng.random() < 0.1)
    chosen += chosen[: rng.choice([0, 0, 1])]
    segments = [Untrainable(record_id=n, reason="quarantined_image", detail="gone") for n in chosen]
    door = LearnerDoor(broker, claim_settings(world_size=WORLD_SIZE))
    if model.quarantine(step, chosen) or not chosen:
        door.quarantine(optimizer_step=step, segments=segments)
    else:
        with pytest.raises(RunStopped):
            door.quarantine(optimizer_step=step, segments=segments)
