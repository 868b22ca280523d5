"""Measures latency at a steady rate, and the cost of a record as producers and ranks are added."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import redis

from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.client import SegmentSink
from broker_schemas.records.packs import StepClaim
from rollstream.bench.queue_throughput import (
    SEGMENTS_IN_PACK,
    SINK,
    EncodedRollout,
    cpu_s,
    make_rollouts,
    open_run,
    push_match_and_pack,
)

RATE_PER_S = 50.0
PUSH_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """From the call of push to the return of the consumer's read, one record at a time."""

    records_per_s: float
    num_records: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, kw_only=True)
class GrowthRow:
    """What one record costs with so many clients at once: time on the clock, and CPU time of the broker."""

    role: Literal["producers", "ranks"]
    num_clients: int
    num_records: int
    wall_us: float
    broker_cpu_us: float


def measure_latency(url: str, rng: random.Random, *, seconds: float) -> LatencyReport:
    """Push one record every 20 ms, whatever the last one took, while a consumer reads and commits."""
    rollouts = make_rollouts(rng, int(seconds * RATE_PER_S), num_tokens=1_950)
    pushed_at: dict[str, float] = {}
    latencies_ms: list[float] = []
    consumer = threading.Thread(target=_consume, args=(url, "latency-run", rollouts, pushed_at, latencies_ms))
    consumer.start()
    broker = open_run_named(url, "latency-run")
    sink = SegmentSink(broker, SINK)
    started = time.perf_counter()
    for index, rollout in enumerate(rollouts):
        time.sleep(max(0.0, started + index / RATE_PER_S - time.perf_counter()))
        pushed_at[rollout.record_id] = time.perf_counter()
        sink.push([rollout])
    consumer.join()
    broker.close()
    cuts = statistics.quantiles(latencies_ms, n=100)
    return LatencyReport(
        records_per_s=RATE_PER_S,
        num_records=len(latencies_ms),
        p50_ms=cuts[49],
        p99_ms=cuts[98],
        max_ms=max(latencies_ms),
    )


def open_run_named(url: str, run: str) -> Any:
    """Return the run of a name, shared by several connections."""
    from broker_schemas.broker.broker import Broker
    from broker_schemas.broker.connection import BrokerAddress

    return Broker.connect(run, BrokerAddress(url=url))


def _consume(
    url: str,
    run: str,
    rollouts: Sequence[EncodedRollout],
    pushed_at: dict[str, float],
    latencies_ms: list[float],
) -> None:
    broker = open_run_named(url, run)
    door = MatcherDoor(broker, "m-0")
    give_up_at = time.monotonic() + 2 * len(rollouts) / RATE_PER_S + 30
    while len(latencies_ms) < len(rollouts) and time.monotonic() < give_up_at:
        entries = door.read(count=64, block_ms=500)
        now = time.perf_counter()
        latencies_ms += [1000 * (now - pushed_at[entry.record_id]) for entry in entries]
        verdicts = [MatchVerdict(entry=entry, outcome="dropped", reason="bench") for entry in entries]
        door.commit(verdicts, oldest_policy_version=0)
    broker.close()


def measure_growth(url: str, rng: random.Random, *, quick: bool) -> tuple[GrowthRow, ...]:
    """Return the cost of a record for 1 to 64 producers that push at once and 1 to 32 ranks of a step."""
    producers = (1, 8) if quick else (1, 4, 16, 64)
    ranks = (1, 4) if quick else (1, 2, 8, 32)
    num = 512 if quick else 4_096
    rollouts = make_rollouts(rng, num, num_tokens=1_950)
    rows = [_producers_row(url, rollouts, count) for count in producers]
    return (*rows, *(_ranks_row(url, rollouts, count) for count in ranks))


def _producers_row(url: str, rollouts: Sequence[EncodedRollout], num_clients: int) -> GrowthRow:
    run = open_run(url, f"p{num_clients}")
    sinks = [SegmentSink(open_run_named(url, run.keys.run), SINK) for _ in range(num_clients)]
    share = len(rollouts) // num_clients

    def push(client: int) -> None:
        mine = rollouts[client * share : (client + 1) * share]
        for first in range(0, len(mine), PUSH_BATCH):
            sinks[client].push(mine[first : first + PUSH_BATCH])

    row = _timed(url, "producers", num_clients, share * num_clients, push)
    run.client.unlink(*run.client.scan_iter(run.keys.prefix + "*", count=1000))
    return row


def _ranks_row(url: str, rollouts: Sequence[EncodedRollout], num_clients: int) -> GrowthRow:
    """One step of as many packs a rank as there are: rank 0 claims and settles, every rank fetches."""
    run = open_run(url, f"r{num_clients}")
    packs_per_rank = len(rollouts) // (SEGMENTS_IN_PACK * num_clients)
    for first in range(0, len(rollouts), 512):
        push_match_and_pack(run, rollouts[first : first + 512], num_clients)
    settings = ClaimSettings(
        world_size=num_clients, packs_per_rank=packs_per_rank, version_window=2, mode="fallback"
    )
    doors = [LearnerDoor(open_run_named(url, run.keys.run), settings) for _ in range(num_clients)]
    told: list[StepClaim] = []
    claimed = threading.Barrier(num_clients)

    def learn(rank: int) -> None:
        if rank == 0:  # it decides and tells the others, as under torchrun
            claim = doors[0].claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
            told.extend([claim] if claim is not None else [])
        claimed.wait()
        for pack in told[0].packs[rank]:
            doors[rank].fetch_segments(pack.record_ids)
        claimed.wait()
        if rank == 0:
            doors[0].commit_step(optimizer_step=0, summary={"loss": 1.0})
            doors[0].settle_checkpoint(optimizer_step=1)

    row = _timed(url, "ranks", num_clients, packs_per_rank * num_clients * SEGMENTS_IN_PACK, learn)
    run.client.unlink(*run.client.scan_iter(run.keys.prefix + "*", count=1000))
    return row


def _timed(
    url: str,
    role: Literal["producers", "ranks"],
    num_clients: int,
    num_records: int,
    body: Callable[[int], None],
) -> GrowthRow:
    watch = redis.Redis.from_url(url)
    cpu_before, started = cpu_s(watch), time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(body, range(num_clients)))
    wall_s, broker_s = time.perf_counter() - started, cpu_s(watch) - cpu_before
    watch.close()
    return GrowthRow(
        role=role,
        num_clients=num_clients,
        num_records=num_records,
        wall_us=1e6 * wall_s / num_records,
        broker_cpu_us=1e6 * broker_s / num_records,
    )
