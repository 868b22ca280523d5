"""Measures a hop and the whole way of a rollout between processes of their own, encoding and decoding inside.

Each role is a process, started once and told what to do; the first starts the clock, the last stops it.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO

import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.client import SegmentSink
from broker_schemas.errors import RunStopped
from broker_schemas.records.records import SegmentRecord
from rollstream.bench.queue_throughput import (
    SEGMENTS_IN_PACK,
    SINK,
    cpu_s,
    make_segment,
    open_run,
    plain_rollouts,
    plan_packs,
)
from rollstream.bench.references.record_stream import plain_records, read_records, write_records

SETTLE_EVERY: Final = 8
PACKS_IN_STEP: Final = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """What every process of a measurement works on."""

    url: str
    num_records: int
    num_tokens: int
    batch: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """One record size: medians over repetitions, CPU time of the broker for a record, and each ratio.

    ``ratios`` are ours over bare, ``times_stream`` ours over PipelineRL's stream, repetition by repetition.
    """

    what: str
    records_per_s: float
    bare_records_per_s: float
    broker_cpu_us: float
    bare_broker_cpu_us: float
    stream_records_per_s: float
    stream_broker_cpu_us: float
    ratios: tuple[float, ...]
    times_stream: tuple[float, ...]
    least_ratio: float
    least_times_stream: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def times(self) -> float:
        return statistics.median(self.times_stream)


@dataclass(frozen=True, kw_only=True)
class WholeWayReport:
    """A rollout from push to settled over three processes: medians over repetitions."""

    num_records: int
    records_per_s: float
    broker_cpu_us: float


def measure_throughput(url: str, seed: int, *, quick: bool) -> tuple[ThroughputRow, ...]:
    """Return the row of 8 KB records and the row of 1 MB records."""
    small = Load(url=url, num_records=256 if quick else 4_096, num_tokens=1_950, batch=64, seed=seed)
    large = Load(url=url, num_records=8 if quick else 96, num_tokens=262_000, batch=8, seed=seed)
    num = 1 if quick else 9
    return (
        _row("8 KB records, batches of 64", small, num, least_ratio=0.8, least_times_stream=3.5),
        _row("1 MB records, batches of 8", large, num, least_ratio=0.95, least_times_stream=1.4),
    )


def measure_whole_way(url: str, seed: int, *, quick: bool) -> WholeWayReport:
    """Push, match, pack, claim, fetch and settle 8 KB rollouts: producer, matcher with packer, learner."""
    load = Load(url=url, num_records=256 if quick else 4_096, num_tokens=1_950, batch=64, seed=seed)
    with _workers(load, "push", "match and pack", "learn") as workers:
        timed = [_repetition(load, workers) for _ in range(2 if quick else 6)][1:]
    return WholeWayReport(
        num_records=load.num_records,
        records_per_s=load.num_records / statistics.median(seconds for seconds, _ in timed),
        broker_cpu_us=statistics.median(cpu_us for _, cpu_us in timed),
    )


def _row(
    what: str, load: Load, repetitions: int, *, least_ratio: float, least_times_stream: float
) -> ThroughputRow:
    with (
        _workers(load, "push", "take") as ours,
        _workers(load, "push bare", "take bare") as bare,
        _workers(load, "write stream", "read stream") as stream,
    ):
        rounds = [
            tuple(_repetition(load, workers) for workers in (ours, bare, stream))
            for _ in range(repetitions + 1)
        ][1:]
    seconds, cpu_us = ([[run[k] for run in runs] for runs in rounds] for k in (0, 1))
    medians = [load.num_records / statistics.median(column) for column in zip(*seconds, strict=True)]
    costs = [statistics.median(column) for column in zip(*cpu_us, strict=True)]
    return ThroughputRow(
        what=what,
        records_per_s=medians[0],
        bare_records_per_s=medians[1],
        stream_records_per_s=medians[2],
        broker_cpu_us=costs[0],
        bare_broker_cpu_us=costs[1],
        stream_broker_cpu_us=costs[2],
        ratios=tuple(bare_s / ours_s for ours_s, bare_s, _ in seconds),
        times_stream=tuple(stream_s / ours_s for ours_s, _, stream_s in seconds),
        least_ratio=least_ratio,
        least_times_stream=least_times_stream,
    )


def _repetition(load: Load, workers: Sequence[_Worker]) -> tuple[float, float]:
    """Return seconds from the first worker's start to the last end, and the broker's CPU us a record."""
    broker = open_run(load.url, "hop")
    for worker in workers:
        worker.prepare(broker.keys.run)
    before_s = cpu_s(broker.client)
    for worker in reversed(workers):  # whoever waits for others is there before them
        worker.start()
    times = [worker.finish() for worker in workers]
    cpu_us = 1e6 * (cpu_s(broker.client) - before_s) / load.num_records
    broker.client.unlink(*broker.client.scan_iter(broker.keys.prefix + "*", count=1000))
    broker.close()
    return max(ended for _, ended in times) - times[0][0], cpu_us


class _Worker:
    """A process of its own that does one job, each time on the run it is told, a line for each word."""

    def __init__(self, job: str, load: Load) -> None:
        command = [sys.executable, "-m", __name__, job, json.dumps(asdict(load))]
        self._job = job
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def prepare(self, run: str) -> None:
        self._say(run)
        self._hear()

    def start(self) -> None:
        self._say("start")

    def finish(self) -> tuple[float, float]:
        started, ended = (float(word) for word in self._hear().split())
        return started, ended

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None, "a pipe"
        word = self._process.stdout.readline()
        if not word:
            raise RunStopped(f"bench: its process '{self._job}' ended; what it said is above")
        return word


@contextmanager
def _workers(load: Load, *jobs: str) -> Iterator[list[_Worker]]:
    workers = [_Worker(job, load) for job in jobs]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def serve(job: str, load: Load, orders: TextIO, answers: TextIO) -> None:
    """Do ``job`` on every run that ``orders`` name; the body of a worker's process."""
    rollouts: Sequence[Any] = plain_rollouts(
        random.Random(load.seed), load.num_records, num_tokens=load.num_tokens
    )
    if job == "write stream":
        rollouts = plain_records(rollouts)
    while run := orders.readline().strip():
        broker = Broker.connect(run, BrokerAddress(url=load.url))
        if "bare" in job:
            _make_bare_group(broker)
        answers.write("ready\n")
        answers.flush()
        orders.readline()
        started_s = time.monotonic()
        JOBS[job](broker, rollouts, load)
        answers.write(f"{started_s} {time.monotonic()}\n")
        answers.flush()
        broker.close()


def _push(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    batches = (rollouts[first : first + load.batch] for first in range(0, len(rollouts), load.batch))
    for _ in SegmentSink(broker, SINK).push_batches(batches, deadline_s=60.0):
        pass


def _take(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    door, num = MatcherDoor(broker, "m-0"), 0
    while num < load.num_records:
        entries = door.read(count=load.batch, block_ms=1_000)
        for entry in entries:
            SegmentRecord.decode_body(entry.body or b"", entry.schema_version)
        verdicts = [MatchVerdict(entry=entry, outcome="dropped", reason="stale") for entry in entries]
        door.commit(verdicts, oldest_policy_version=0)
        num += len(entries)


def _make_bare_group(broker: Broker) -> None:
    try:
        broker.client.xgroup_create(broker.keys.named("bare"), "g", id="0", mkstream=True)
    except redis.exceptions.ResponseError as exc:
        if not str(exc).startswith("BUSYGROUP"):
            raise


def _push_bare(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    stream = broker.keys.named("bare")
    for first in range(0, len(rollouts), load.batch):
        pipe = broker.client.pipeline(transaction=False)
        for record in rollouts[first : first + load.batch]:
            pipe.xadd(stream, {"record_id": record.record_id, "body": record.encode_body()})
        pipe.execute()


def _take_bare(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    stream, num = broker.keys.named("bare"), 0
    while num < load.num_records:
        reply: Any = broker.client.xreadgroup("g", "c", {stream: ">"}, count=load.batch, block=1_000)
        if not reply:
            continue
        rows = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        for _, fields in rows:
            SegmentRecord.decode_body(fields[b"body"])
        ids = [entry_id for entry_id, _ in rows]
        pipe = broker.client.pipeline(transaction=False)
        pipe.xack(stream, "g", *ids)
        pipe.xdel(stream, *ids)
        pipe.execute()
        num += len(rows)


def _write_stream(broker: Broker, records: Sequence[dict[str, Any]], load: Load) -> None:
    write_records(broker, records)


def _read_stream(broker: Broker, records: Sequence[Any], load: Load) -> None:
    read_records(broker, load.num_records)


def _match_and_pack(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    matcher, packer = MatcherDoor(broker, "m-0"), PackerDoor(broker)
    num_matched = num_packed = 0
    while num_packed < load.num_records:
        entries = matcher.read(count=load.batch, block_ms=1_000) if num_matched < load.num_records else []
        records = [SegmentRecord.decode_body(entry.body or b"", entry.schema_version) for entry in entries]
        verdicts = [
            MatchVerdict(entry=entry, outcome="matched", segment=make_segment(record))
            for entry, record in zip(entries, records, strict=True)
        ]
        num_matched += len(matcher.commit(verdicts, oldest_policy_version=0))
        held = packer.read(count=load.batch, block_ms=1)
        packer.commit(plan_packs(held), oldest_policy_version=0, queue_limit=0)
        num_packed += len(held)


def _learn(broker: Broker, rollouts: Sequence[SegmentRecord], load: Load) -> None:
    num_steps = load.num_records // (SEGMENTS_IN_PACK * PACKS_IN_STEP)
    door = LearnerDoor(
        broker, ClaimSettings(world_size=1, packs_per_rank=PACKS_IN_STEP, mode="wait", version_window=2)
    )
    for step in range(num_steps):
        while (claim := door.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)) is None:
            time.sleep(0.002)
        door.fetch_segments(claim.record_ids)
        door.commit_step(optimizer_step=step, summary={"loss": 1.0})
        if (step + 1) % SETTLE_EVERY == 0:
            door.settle_checkpoint(optimizer_step=step + 1)
    door.settle_checkpoint(optimizer_step=num_steps)


JOBS: Final[dict[str, Callable[[Broker, Sequence[Any], Load], None]]] = {
    "push": _push,
    "take": _take,
    "push bare": _push_bare,
    "take bare": _take_bare,
    "write stream": _write_stream,
    "read stream": _read_stream,
    "match and pack": _match_and_pack,
    "learn": _learn,
}

if __name__ == "__main__":
    serve(sys.argv[1], Load(**json.loads(sys.argv[2])), sys.stdin, sys.stdout)
