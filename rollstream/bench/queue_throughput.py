"""Measures throughput against the bare commands, memory and wire size of the queue on a running server."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.client import SegmentSink, SinkSettings
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import (
    GroundTruthObject,
    MatchedSegment,
    SegmentRecord,
    wire_bytes_per_token,
)
from rollstream.history.archive import EVENTS_KEPT_IN_BROKER

SINK = SinkSettings(max_bytes=8 << 30)
SEGMENTS_IN_PACK = 8
BARE_STREAM = "bare"
_RUNS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class EncodedRollout(SegmentRecord):
    """A rollout whose bytes are made before the clock starts, as those of the baseline are."""

    body: bytes = b""

    def encode_body(self) -> bytes:
        return self.body


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """One record size: medians of records a second, and the ratio of each repetition."""

    what: str
    records_per_s: float
    bare_records_per_s: float
    ratios: tuple[float, ...]
    least_ratio: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """A run taken all the way, and what the server holds of it afterwards, over what it held before."""

    num_records: int
    records_per_s: float
    peak_bytes: int
    left_bytes: int


def open_run(url: str, what: str) -> Broker:
    """Return a fresh run on the server."""
    return Broker.connect(f"bench-{what}-{next(_RUNS)}", BrokerAddress(url=url))


def make_rollouts(
    rng: random.Random, num: int, *, num_tokens: int, prefix: str = "b"
) -> list[EncodedRollout]:
    """Return ``num`` rollouts of ``num_tokens`` tokens, a quarter of them the response, already encoded."""
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
        rollouts.append(EncodedRollout(**fields, body=SegmentRecord(**fields).encode_body()))
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


def measure_throughput(url: str, rng: random.Random, *, quick: bool) -> tuple[ThroughputRow, ...]:
    """Return the row of 8 KB records and the row of 1 MB records."""
    small = make_rollouts(rng, 256 if quick else 2_048, num_tokens=1_950)
    large = make_rollouts(rng, 8 if quick else 48, num_tokens=262_000)
    num = 3 if quick else 15
    return (
        _row("8 KB records, batches of 64", url, small, batch=64, repetitions=num, least_ratio=0.7),
        _row("1 MB records, batches of 8", url, large, batch=8, repetitions=num, least_ratio=0.8),
    )


def _row(
    what: str,
    url: str,
    rollouts: Sequence[EncodedRollout],
    *,
    batch: int,
    repetitions: int,
    least_ratio: float,
) -> ThroughputRow:
    pairs = [_repetition(url, rollouts, batch) for _ in range(repetitions + 1)][1:]  # the first warms up
    return ThroughputRow(
        what=what,
        records_per_s=len(rollouts) / statistics.median(pair[0] for pair in pairs),
        bare_records_per_s=len(rollouts) / statistics.median(pair[1] for pair in pairs),
        ratios=tuple(bare_s / ours_s for ours_s, bare_s in pairs),
        least_ratio=least_ratio,
    )


def _repetition(url: str, rollouts: Sequence[EncodedRollout], batch: int) -> tuple[float, float]:
    """Return the seconds of ours and of the bare commands, batch by batch in turn: what else the machine does
    meanwhile slows both.
    """
    broker, client = open_run(url, "ours"), redis.Redis.from_url(url)
    client.xgroup_create(BARE_STREAM, "g", id="0", mkstream=True)
    sink, door = SegmentSink(broker, SINK), MatcherDoor(broker, "m-0")
    ours_s = bare_s = 0.0
    for number, first in enumerate(range(0, len(rollouts), batch)):
        records = rollouts[first : first + batch]
        for is_ours in (number % 2 == 0, number % 2 == 1):
            started = time.perf_counter()
            if is_ours:
                _pass_ours(sink, door, records)
                ours_s += time.perf_counter() - started
            else:
                _pass_bare(client, records)
                bare_s += time.perf_counter() - started
    client.unlink(BARE_STREAM)
    client.close()
    _forget(broker)
    return ours_s, bare_s


def _pass_ours(sink: SegmentSink, door: MatcherDoor, records: Sequence[EncodedRollout]) -> None:
    sink.push(records)
    entries = door.read(count=len(records), block_ms=1_000)
    verdicts = [MatchVerdict(entry=entry, outcome="dropped", reason="bench") for entry in entries]
    door.commit(verdicts, oldest_policy_version=0)


def _pass_bare(client: redis.Redis, records: Sequence[EncodedRollout]) -> None:
    pipe = client.pipeline(transaction=False)
    for record in records:
        pipe.xadd(BARE_STREAM, {"record_id": record.record_id, "body": record.body})
    pipe.execute()
    reply: Any = client.xreadgroup("g", "c", {BARE_STREAM: ">"}, count=len(records), block=1_000)
    rows = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
    ids = [entry_id for entry_id, _ in rows]
    pipe = client.pipeline(transaction=False)
    pipe.xack(BARE_STREAM, "g", *ids)
    pipe.xdel(BARE_STREAM, *ids)
    pipe.execute()


def _forget(broker: Broker) -> None:
    broker.client.unlink(*broker.client.scan_iter(broker.keys.prefix + "*", count=1000))
    broker.close()


def measure_memory(url: str, rng: random.Random, *, num_records: int) -> MemoryReport:
    """Take a run all the way and return what is left of it in the server, its log as the archive trims it."""
    rollouts = make_rollouts(rng, num_records, num_tokens=1_950)
    watch = redis.Redis.from_url(url)
    before = _used_bytes(watch)
    broker = open_run(url, "memory")
    started = time.perf_counter()
    peak = 0
    for step, first in enumerate(range(0, num_records, 64)):
        push_match_and_pack(broker, rollouts[first : first + 64])
        peak = max(peak, _used_bytes(watch) - before)
        train(broker, step)
    seconds = time.perf_counter() - started
    last: Any = broker.client.xrevrange(broker.keys.named("events"), count=1)
    broker.run("advance_archive", ["archive"], [last[0][0], EVENTS_KEPT_IN_BROKER])
    broker.close()
    left = _used_bytes(watch) - before
    watch.close()
    return MemoryReport(
        num_records=num_records,
        records_per_s=num_records / seconds,
        peak_bytes=peak,
        left_bytes=left,
    )


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
    packs = [held[first : first + SEGMENTS_IN_PACK] for first in range(0, len(held), SEGMENTS_IN_PACK)]
    planned = [_planned(members, index % world_size) for index, members in enumerate(packs)]
    packer.commit(planned, oldest_policy_version=0, queue_limit=0)


def _planned(members: Sequence[PendingDescriptor], rank: int) -> PlannedPack:
    ids = tuple(item.descriptor.record_id for item in members)
    lengths = tuple(item.descriptor.encoded_length for item in members)
    pack = ReadyPack(pack_id=f"p-{ids[0]}", record_ids=ids, lengths=lengths, policy_version=0, fill=1.0)
    return PlannedPack(rank=rank, pack=pack, entry_ids=tuple(item.entry_id for item in members))


def train(broker: Broker, optimizer_step: int) -> None:
    """Claim whatever is ready, fetch it, commit and settle the step."""
    depth = PackerDoor(broker).ready_depths(1)[0]
    learner = LearnerDoor(broker, ClaimSettings(world_size=1, packs_per_rank=depth))
    claim = learner.claim_step(optimizer_step=optimizer_step, scheduled_kind="B", policy_version=0)
    assert claim is not None, "in mode fallback every claim is decided"
    learner.fetch_segments(claim.record_ids)
    learner.commit_step(optimizer_step=optimizer_step, summary={"loss": 1.0})
    learner.settle_checkpoint(optimizer_step=optimizer_step + 1)


def bytes_per_token(rng: random.Random) -> dict[str, float]:
    """Return bytes per token of a rollout of 1,950 tokens, with and without log-probabilities, and of its
    training segment.
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
