"""What a crashed broker gives back: all of it with `always`, maybe not its last second with `everysec`."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from broker_schemas.errors import BrokerError, RunStopped
from rollstream.bench.queue_throughput import make_rollouts, push_match_and_pack
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_loss import read_losses
from rollstream.history.audit import Audit, WholeLog, take_audit
from rollstream.history.audit_view import render_audit
from rollstream.stack.embedded_redis import Durability, EmbeddedRedis
from tests.builders.rollouts import make_rollout
from tests.builders.settings import claim_settings

LOG_FILE = "appendonly.aof"


@dataclass
class Crashing:
    """A server that is killed and started again; ``cut`` gives back an older append-only file."""

    folder: Path
    durability: Durability
    server: EmbeddedRedis

    def connect(self, retries: int = 6) -> Broker:
        return Broker.connect("crash", BrokerAddress(url=self.server.url, retries=retries))

    def log_files(self) -> list[Path]:
        return [path for path in self.folder.rglob(LOG_FILE + "*") if path.is_file() and path.stat().st_size]

    def size_bytes(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in self.log_files()}

    def crash(self, cut: dict[Path, int] | None = None) -> None:
        self.server.process.kill()
        self.server.process.wait()
        for path, size in (cut or {}).items():
            with path.open("r+b") as file:
                file.truncate(size)
        self.server = EmbeddedRedis.start(self.folder, durability=self.durability)


@pytest.fixture
def start_crashing(tmp_path: Path) -> Iterator[Callable[[Durability], Crashing]]:
    started: list[Crashing] = []

    def start(durability: Durability) -> Crashing:
        folder = tmp_path / "redis"
        server = EmbeddedRedis.start(folder, durability=durability)
        started.append(Crashing(folder, durability, server))
        return started[-1]

    yield start
    for item in started:
        item.server.stop()
        shutil.rmtree(item.folder)


def fill(broker: Broker, num: int, prefix: str) -> None:
    push_match_and_pack(broker, make_rollouts(random.Random(1), num, num_tokens=30, prefix=prefix))


def a_learner(broker: Broker) -> LearnerDoor:
    return LearnerDoor(broker, claim_settings(world_size=1, mode="wait"))


def train(learner: LearnerDoor, optimizer_step: int) -> tuple[str, ...]:
    claim = learner.claim_step(optimizer_step=optimizer_step, scheduled_kind="B", policy_version=0)
    assert claim is not None
    learner.commit_step(optimizer_step=optimizer_step, summary={"loss": 1.0})
    return claim.record_ids


def drain(archive: ArchiveWriter) -> None:
    stopped = threading.Event()
    stopped.set()
    archive.loop(stopped)


def audit_of(folder: Path, broker: Broker | None) -> Audit:
    counters = None if broker is None else dict(read_status(broker, 1).counters)
    return take_audit(WholeLog(folder, broker), counters=counters)


@pytest.mark.req("Q-1", "Q-4")
@pytest.mark.parametrize("durability", ["always", "everysec"])
def test_a_killed_server_gives_back_every_push_that_it_acknowledged(
    start_crashing: Callable[[Durability], Crashing], durability: Durability
) -> None:
    """Given a producer that pushes all the time, when the server's process is killed under it five times."""
    crashing, acknowledged = start_crashing(durability), []
    stop, chance = threading.Event(), random.Random(5)
    enough = threading.Semaphore(0)

    def push_all_the_time() -> None:
        sink, number = SegmentSink(crashing.connect()), 0
        while not stop.is_set():
            record = make_rollout(record_id=f"k-{number}")
            try:
                (status,) = sink.push([record])
            except BrokerError:
                continue
            assert status in ("ok", "duplicate")
            acknowledged.append(record.record_id)
            number += 1
            enough.release()

    pusher = threading.Thread(target=push_all_the_time)
    pusher.start()
    for _ in range(5):
        for _ in range(chance.randint(20, 120)):
            assert enough.acquire(timeout=60)
        crashing.crash()
    stop.set()
    pusher.join()
    broker = crashing.connect()

    rows = broker.client.xrange(broker.keys.named("segments"))
    found = [fields[b"record_id"].decode() for _, fields in rows]  # type: ignore[union-attr]

    assert found == acknowledged
    assert read_status(broker, 1).total("pushed") == len(acknowledged)
    broker.close()


@pytest.fixture
def lossy(start_crashing: Callable[[Durability], Crashing]) -> Crashing:
    """A server that loses what the test says; it writes at once, so that the test knows what is on disk."""
    return start_crashing("always")


@pytest.mark.req("Q-14")
def test_what_a_power_cut_took_is_undone_in_the_archive_and_told_by_the_audit(
    lossy: Crashing, tmp_path: Path
) -> None:
    """Given an archived step that stands in the last second of the server's log, when that second is lost."""
    folder, broker = tmp_path / "archive", lossy.connect()
    fill(broker, 12, "a")
    archive = ArchiveWriter(broker, folder)
    drain(archive)
    train(a_learner(broker), 0)
    drain(archive)
    on_disk = lossy.size_bytes()
    lost = set(train(a_learner(broker), 1))
    fill(broker, 3, "b")
    drain(archive)
    archive.close()

    lossy.crash(cut=on_disk)
    broker = lossy.connect()

    before = audit_of(folder, broker)
    assert (before.balanced, before.undone["optimizer_steps"]) == (True, [1])
    again = set(train(a_learner(broker), 1))
    archive = ArchiveWriter(broker, folder)
    drain(archive)
    archive.close()
    assert again == lost
    assert len(read_losses(folder)) == 1
    for audit in (audit_of(folder, broker), audit_of(folder, None)):
        assert audit.balanced, audit.faults
        assert audit.asked == 12
        assert audit.undone["optimizer_steps"] == [1]
        assert audit.undone["trained_again"] == 0
        assert audit.undone["events"] >= 5
        assert any("lost" in str(part) for part in render_audit(audit).renderables)  # type: ignore[union-attr]
    broker.close()


@pytest.mark.req("Q-10", "Q-14")
def test_a_learner_whose_claim_was_lost_stops_and_says_so(lossy: Crashing, tmp_path: Path) -> None:
    folder, broker = tmp_path / "archive", lossy.connect()
    fill(broker, 12, "a")
    learner, archive = a_learner(broker), ArchiveWriter(broker, folder)
    train(learner, 0)
    drain(archive)
    on_disk = lossy.size_bytes()
    lost = set(train(learner, 1))
    drain(archive)

    lossy.crash(cut=on_disk)

    with pytest.raises(RunStopped, match=r"step 1: the broker no longer knows its claim.* 'always'"):
        learner.claim_step(optimizer_step=2, scheduled_kind="B", policy_version=0)
    with pytest.raises(RunStopped, match="step 1: the broker no longer knows its claim"):
        learner.commit_step(optimizer_step=1, summary={})
    # a checkpoint that covers the lost step: its rollouts come again, and the audit counts them
    resumed = a_learner(broker)
    resumed.settle_checkpoint(optimizer_step=2)
    assert set(train(resumed, 2)) == lost
    drain(archive)
    audit = audit_of(folder, broker)
    assert audit.balanced, audit.faults
    assert audit.undone["trained_again"] == len(lost)
    archive.close()
    broker.close()


def archive_without_noting(broker: Broker, folder: Path) -> ArchiveWriter:
    """Archive a batch whose end the broker is never told: reads go on, the noting of the cursor fails."""
    archive = ArchiveWriter(
        broker, folder, confirm=lambda: broker.client.config_set("min-replicas-to-write", 1)
    )
    before = archive.cursor
    with pytest.raises(BrokerError):
        archive.step(block_ms=1)
    broker.client.config_set("min-replicas-to-write", 0)
    archive.close()
    assert archive.cursor != before
    return archive


@pytest.mark.req("Q-14", "Q-20")
@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_was_archived_but_not_yet_noted_is_named_when_the_broker_lost_it(
    lossy: Crashing, tmp_path: Path, is_restarted: bool
) -> None:
    folder, broker = tmp_path / "archive", lossy.connect()
    fill(broker, 12, "a")
    drain(ArchiveWriter(broker, folder))
    on_disk = lossy.size_bytes()
    train(a_learner(broker), 0)
    archive = archive_without_noting(broker, folder)

    lossy.crash(cut=on_disk)
    train(a_learner(broker), 0)
    again = ArchiveWriter(broker, folder)
    if not is_restarted:
        again.cursor, again._noted = archive.cursor, archive._noted
    drain(again)

    assert [loss.lost_upto for loss in read_losses(folder)] == [archive.cursor]
    audit = audit_of(folder, broker)
    assert (audit.balanced, audit.undone["optimizer_steps"]) == (True, [0]), audit.faults
    broker.close()


@pytest.mark.req("Q-14")
def test_an_archive_killed_before_it_told_the_broker_is_no_loss(lossy: Crashing, tmp_path: Path) -> None:
    folder, broker = tmp_path / "archive", lossy.connect()
    fill(broker, 4, "a")
    archive_without_noting(broker, folder)

    archive = ArchiveWriter(broker, folder)
    train(a_learner(broker), 0)
    drain(archive)
    archive.close()

    assert read_losses(folder) == []
    assert audit_of(folder, broker).undone == {}
    broker.close()


@pytest.mark.req("Q-14")
def test_a_broker_that_comes_back_empty_is_told_by_the_audit(
    start_crashing: Callable[[Durability], Crashing], tmp_path: Path
) -> None:
    crashing = start_crashing("none")
    folder, broker = tmp_path / "archive", crashing.connect()
    fill(broker, 4, "a")
    archive = ArchiveWriter(broker, folder)
    drain(archive)

    crashing.crash()
    broker.make_groups()
    fill(broker, 5, "a")
    drain(archive)

    audit = audit_of(folder, broker)
    assert (audit.asked, audit.balanced) == (5, True), audit.faults
    assert audit.undone["events"] > 0
    archive.close()
    broker.close()
