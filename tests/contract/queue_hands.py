"""What the consumers of the queue's model hold, and how a stream gives it to them."""

from __future__ import annotations

import random
from typing import Any

from broker_schemas.broker.packer_door import PendingDescriptor, PlannedPack
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment
from tests.builders.records import a_segment
from tests.contract.queue_model import ModelPack


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
