"""Measures memory, wire size and what each transition costs the server; makes the rollouts of the bench."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.packer_door import PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.client import SegmentSink, SinkSettings
from broker_schemas.records.packs import ReadyPack, StepClaim
from broker_schemas.records.records import (
    GroundTruthObject,
    MatchedSegment,
    SegmentRecord,
    wire_bytes_per_token,
)
from rollstream.history.archive import EVENTS_KEPT_IN_BROKER

SINK = SinkSettings(max_bytes=8 << 30)
SEGMENTS_IN_PACK = 8
BODIES_ALONE = "its two bodies alone, no script"
_RUNS = itertools.count()
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedRollout(SegmentRecord):
    """A rollout whose bytes are made before the clock starts, as those of the baseline are."""

    body: bytes = b""

    def encode_body(self) -> bytes:
        return self.body


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """A run taken all the way, and what the server holds of it afterwards, over what it held before.

    ``held_ratio`` is the server's memory over the bodies, with 1,000 rollouts of 8 KB waiting in it.
    """

    num_records: int
    held_ratio: float
    left_bytes: int


@dataclass(frozen=True, kw_only=True)
class TransitionCost:
    """CPU time of the server for a record on a part of its way, the bodies that go with it included."""

    what: str
    broker_cpu_us: float


def open_run(url: str, what: str) -> Broker:
    """Return a fresh run on the server."""
    return Broker.connect(f"bench-{what}-{next(_RUNS)}", BrokerAddress(url=url))


def make_rollouts(
    rng: random.Random, num: int, *, num_tokens: int, prefix: str = "b"
) -> list[EncodedRollout]:
    """Return ``num`` rollouts of ``num_tokens`` tokens, a quarter of them the response, already encoded."""
    plain = plain_rollouts(rng, num, num_tokens=num_tokens, prefix=prefix)
    return [EncodedRollout(**vars(record), body=record.encode_body()) for record in plain]


def plain_rollouts(
    rng: random.Random, num: int, *, num_tokens: int, prefix: str = "b"
) -> list[SegmentRecord]:
    """Return the same rollouts, to be encoded when they are pushed."""
    generator = np.random.default_rng(rng.randrange(1 << 30))
    rollouts = []
    for index in range(num):
        ids = generator.integers(0, 150_000, num_tokens, dtype=np.int32)
        fields: dict[str, Any] = {
            "record_id": f"{prefix}-{index}",
            "policy_version": 0,
            "sample_id": f"train-{index}",
            "task": "bbox",
            "images": (),
            "processor_fingerprint": "f00d",
            "assistant_payload": (GroundTruthObject(desc="WBC", geometry="bbox_2d", bins=(1, 2, 300, 400)),),
            "prompt_token_ids": ids[: 3 * num_tokens // 4],
            "response_token_ids": ids[3 * num_tokens // 4 :],
        }
        rollouts.append(SegmentRecord(**fields))
    return rollouts


def make_segment(record: SegmentRecord) -> MatchedSegment:
    """Return a training segment as long as the rollout, with 14 boxes of slots in its answer."""
    token_ids = np.concatenate([record.prompt_token_ids, record.response_token_ids])
    first = len(record.prompt_token_ids)
    slots = np.arange(first, first + min(56, len(token_ids) - first), dtype=np.int32)
    ce_mask = np.zeros(len(token_ids), dtype=np.bool_)
    ce_mask[first + len(slots) :] = True
    return MatchedSegment(
        record_id=record.record_id,
        channel="B",
        policy_version=record.policy_version,
        sample_id=record.sample_id,
        task=record.task,
        images=record.images,
        processor_fingerprint=record.processor_fingerprint,
        token_ids=token_ids,
        prompt_length=first,
        ce_mask=ce_mask,
        desc_mask=np.zeros(len(token_ids), dtype=np.bool_),
        slot_positions=slots,
        slot_targets=np.full(len(slots), 7, dtype=np.int16),
        slot_in_prefix=np.zeros(len(slots), dtype=np.bool_),
    )


def measure_memory(url: str, rng: random.Random, *, num_records: int) -> MemoryReport:
    """Take a run all the way and return what is left of it in the server, its log as the archive trims it."""
    rollouts = make_rollouts(rng, num_records, num_tokens=1_950)
    watch = redis.Redis.from_url(url)
    before = _used_bytes(watch)
    broker = open_run(url, "memory")
    for step, first in enumerate(range(0, num_records, 64)):
        push_match_and_pack(broker, rollouts[first : first + 64])
        train(broker, step)
    last: Any = broker.client.xrevrange(broker.keys.named("events"), count=1)
    broker.run("advance_archive", ["archive"], [last[0][0], EVENTS_KEPT_IN_BROKER])
    broker.close()
    left = _used_bytes(watch) - before
    watch.close()
    held_ratio = _held_ratio(url, rollouts[:1_000])
    return MemoryReport(num_records=num_records, held_ratio=held_ratio, left_bytes=left)


def _held_ratio(url: str, rollouts: Sequence[EncodedRollout]) -> float:
    """Return the memory that rollouts take in a server, for each byte of their bodies."""
    broker = open_run(url, "held")
    before = _used_bytes(broker.client)
    SegmentSink(broker, SINK).push(rollouts)
    ratio = (_used_bytes(broker.client) - before) / sum(len(rollout.body) for rollout in rollouts)
    _forget(broker)
    return ratio


def _forget(broker: Broker) -> None:
    broker.client.unlink(*broker.client.scan_iter(broker.keys.prefix + "*", count=1000))
    broker.close()


def measure_transitions(url: str, rng: random.Random, *, num_records: int) -> tuple[TransitionCost, ...]:
    """Return what each part of the way costs the server for a record of 8 KB, in batches of 64."""
    rollouts = make_rollouts(rng, num_records, num_tokens=1_950)
    broker = open_run(url, "parts")
    matcher, packer = MatcherDoor(broker, "m-0"), PackerDoor(broker)
    learner = LearnerDoor(
        broker, ClaimSettings(world_size=1, packs_per_rank=SEGMENTS_IN_PACK, mode="wait", version_window=2)
    )
    firsts, steps = range(0, num_records, 64), range(num_records // (SEGMENTS_IN_PACK * SEGMENTS_IN_PACK))
    read: list[list[RawEntry]] = []
    held: list[list[PendingDescriptor]] = []
    claims: list[StepClaim | None] = []

    def claim(step: int) -> StepClaim | None:
        return learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)

    sink = SegmentSink(broker, SINK)
    parts: dict[str, Callable[[], None]] = {
        "push": lambda: _each(firsts, lambda first: sink.push(rollouts[first : first + 64])),
        "read and fetch": lambda: read.extend(matcher.read(count=64, block_ms=1) for _ in firsts),
        "commit match": lambda: _each(read, lambda entries: _match(matcher, entries)),
        "read to pack": lambda: held.extend(packer.read(count=64, block_ms=1) for _ in firsts),
        "commit pack": lambda: _each(
            held, lambda items: packer.commit(plan_packs(items), oldest_policy_version=0, queue_limit=0)
        ),
        "claim step": lambda: claims.extend(claim(step) for step in steps),
        "fetch": lambda: _each(
            claims, lambda found: learner.fetch_segments(found.record_ids if found else ())
        ),
        "commit step": lambda: _each(
            steps, lambda step: learner.commit_step(optimizer_step=step, summary={})
        ),
        "settle": lambda: learner.settle_checkpoint(optimizer_step=len(steps)),
    }
    costs = []
    for what, part in parts.items():
        before_s = cpu_s(broker.client)
        part()
        cpu_us = 1e6 * (cpu_s(broker.client) - before_s) / num_records
        costs.append(TransitionCost(what=what, broker_cpu_us=cpu_us))
    costs.append(TransitionCost(what=BODIES_ALONE, broker_cpu_us=_bodies_alone_us(broker, rollouts)))
    _forget(broker)
    return tuple(costs)


def _bodies_alone_us(broker: Broker, rollouts: Sequence[EncodedRollout]) -> float:
    """Return what a record costs the server whose two bodies come in, go out and are freed, and no more."""
    client, before_s = broker.client, cpu_s(broker.client)
    for first in range(0, len(rollouts), 64):
        some = {
            broker.keys.named(f"alone:{item.record_id}"): item.body for item in rollouts[first : first + 64]
        }
        for _ in range(2):
            client.mset(some)
            client.mget(list(some))
            client.unlink(*some)
    return 1e6 * (cpu_s(client) - before_s) / len(rollouts)


def _each(items: Iterable[T], act: Callable[[T], object]) -> None:
    for item in items:
        act(item)


def _match(matcher: MatcherDoor, entries: Sequence[RawEntry]) -> None:
    verdicts = [
        MatchVerdict(
            entry=entry,
            outcome="matched",
            segment=make_segment(SegmentRecord.decode_body(entry.body or b"", entry.schema_version)),
        )
        for entry in entries
    ]
    matcher.commit(verdicts, oldest_policy_version=0)


def cpu_s(client: redis.Redis) -> float:
    """Return the CPU time that the server has used so far."""
    info: Any = client.info("cpu")
    return float(info["used_cpu_sys"]) + float(info["used_cpu_user"])


def _used_bytes(client: redis.Redis) -> int:
    info: Any = client.info("memory")
    return int(info["used_memory"])


def push_match_and_pack(broker: Broker, rollouts: Sequence[SegmentRecord], world_size: int = 1) -> None:
    """Bring rollouts to the ready queues: packs of 8, to the ranks in turn."""
    SegmentSink(broker, SINK).push(rollouts)
    matcher, packer = MatcherDoor(broker, "m-0"), PackerDoor(broker)
    by_id = {rollout.record_id: rollout for rollout in rollouts}
    verdicts = [
        MatchVerdict(entry=entry, outcome="matched", segment=make_segment(by_id[entry.record_id]))
        for entry in matcher.read(count=len(rollouts), block_ms=1_000)
    ]
    matcher.commit(verdicts, oldest_policy_version=0)
    held = packer.read(count=len(rollouts), block_ms=1_000)
    packer.commit(plan_packs(held, world_size), oldest_policy_version=0, queue_limit=0)


def plan_packs(held: Sequence[PendingDescriptor], world_size: int = 1) -> list[PlannedPack]:
    """Return packs of 8 in order, to the ranks in turn."""
    packs = [held[first : first + SEGMENTS_IN_PACK] for first in range(0, len(held), SEGMENTS_IN_PACK)]
    return [_planned(members, index % world_size) for index, members in enumerate(packs)]


def _planned(members: Sequence[PendingDescriptor], rank: int) -> PlannedPack:
    ids = tuple(item.descriptor.record_id for item in members)
    lengths = tuple(item.descriptor.encoded_length for item in members)
    pack = ReadyPack(pack_id=f"p-{ids[0]}", record_ids=ids, lengths=lengths, policy_version=0, fill=1.0)
    return PlannedPack(rank=rank, pack=pack, entry_ids=tuple(item.entry_id for item in members))


def train(broker: Broker, optimizer_step: int) -> None:
    """Claim whatever is ready, fetch it, commit and settle the step."""
    depth = PackerDoor(broker).ready_depths(1)[0]
    learner = LearnerDoor(
        broker, ClaimSettings(world_size=1, packs_per_rank=depth, version_window=2, mode="fallback")
    )
    claim = learner.claim_step(optimizer_step=optimizer_step, scheduled_kind="B", policy_version=0)
    assert claim is not None, "in mode fallback every claim is decided"
    learner.fetch_segments(claim.record_ids)
    learner.commit_step(optimizer_step=optimizer_step, summary={"loss": 1.0})
    learner.settle_checkpoint(optimizer_step=optimizer_step + 1)


def bytes_per_token(rng: random.Random) -> dict[str, float]:
    """Return bytes per token of a rollout of 1,950 tokens, with and without
    log-probabilities, and of its training segment.
    """
    (rollout,) = make_rollouts(rng, 1, num_tokens=1_950)
    num = len(rollout.prompt_token_ids) + len(rollout.response_token_ids)
    fields = {name: value for name, value in vars(rollout).items() if name != "body"}
    with_logprobs = SegmentRecord(
        **{**fields, "response_logprobs": np.zeros(len(rollout.response_token_ids), np.float32)}
    )
    return {
        "rollout": wire_bytes_per_token(rollout.encode_body(), num),
        "rollout with log-probabilities": wire_bytes_per_token(with_logprobs.encode_body(), num),
        "training segment": wire_bytes_per_token(make_segment(rollout).encode_body(), num),
    }
