"""Tortures the queue, `make torture`: roles as processes, killed, frozen, cut off; a full or dying server.

The books at the end are its own: what producers were told was taken, against what the raw log says became
of it. TORTURE_SECONDS is how long it lasts, TORTURE_SEED which accidents come.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from broker_schemas.errors import BrokerError
from broker_schemas.records.records import SegmentRecord
from rollstream.bench.queue_throughput import SINK, make_rollouts, make_segment, plan_packs
from rollstream.history.audit import take_audit
from rollstream.stack.embedded_redis import EmbeddedRedis, socket_url
from tests.builders.settings import claim_settings

RUN: Final = "torture"
# a server that has imported all of this already and only forks: a killed role is back at once
PROCESSES: Final = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.contract.torture"])
ROLES: Final = ("push-0", "push-1", "match-0", "match-1", "pack", "learn")
BATCH: Final = 8
DRAIN_S: Final = 60.0


class ChaosProxy:
    """Passes bytes between roles and server on a unix socket; ``lose_replies`` swallows one and hangs up."""

    def __init__(self, path: Path, server: str) -> None:
        self._server = server
        self._to_lose = 0
        self._passes = threading.Event()
        self._passes.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_replies(self, num: int) -> None:
        self._to_lose = num

    def hang_up(self) -> None:
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        self._passes.clear()

    def go_on(self) -> None:
        self._passes.set()

    def close(self) -> None:
        self.go_on()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._open:
            self.hang_up()
            time.sleep(0.01)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far, contextlib.suppress(OSError):
            far.connect(self._server)
            self._open |= {near, far}
            asking = threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True)
            asking.start()
            self._pass_on(far, near, True)
            asking.join()
            self._open -= {near, far}

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while raw := source.recv(1 << 16):
                self._passes.wait()
                if is_reply and self._to_lose > 0:
                    self._to_lose -= 1
                    break
                sink.sendall(raw)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def persist(act: Callable[[], Any]) -> Any:
    """Do it until the broker has answered, as each role's loop does."""
    while True:
        try:
            return act()
        except BrokerError:
            time.sleep(0.05)


def push(broker: Broker, folder: Path, name: str) -> None:
    """Push batches and note each that was taken."""
    sink, rng, prefix = SegmentSink(broker, SINK), random.Random(), f"{name}-{os.getpid()}"
    with (folder / f"taken-{prefix}").open("a", buffering=1) as taken:
        for number in itertools.count():
            records = make_rollouts(rng, BATCH, num_tokens=40, prefix=f"{prefix}-{number}")
            persist(lambda records=records: sink.push(records))  # type: ignore[misc]
            taken.writelines(f"{record.record_id}\n" for record in records)
            time.sleep(0.01)


def match(broker: Broker, _: Path, name: str) -> None:
    door = MatcherDoor(broker, name, idle_ms=2_000)

    def turn() -> None:
        entries = door.found_again(time.monotonic(), count=64) if door.is_due(time.monotonic()) else []
        for entry in entries or door.read(count=64, block_ms=100):
            record = SegmentRecord.decode_body(entry.body or b"", entry.schema_version)
            verdict = MatchVerdict(entry=entry, outcome="matched", segment=make_segment(record))
            door.commit([verdict], oldest_policy_version=0)

    while True:
        persist(turn)


def pack(broker: Broker, _: Path, name: str) -> None:
    door = PackerDoor(broker, name, idle_ms=2_000)

    def turn() -> None:
        now_s = time.monotonic()
        found = door.found_again(now_s, count=64, held=()) if door.is_due(now_s) else []
        held = found or door.read(count=64, block_ms=100)
        if held:
            door.commit(plan_packs(held), oldest_policy_version=0, queue_limit=0)

    while True:
        persist(turn)


def learn(broker: Broker, folder: Path, _: str) -> None:
    """Train steps from the last checkpoint on, a file here, which comes before what it settles."""
    checkpoint = folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    door = LearnerDoor(broker, claim_settings(world_size=1, packs_per_rank=1, mode="wait"))

    def turn() -> bool:
        claim = door.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)
        if claim is None:
            return False
        door.fetch_segments(claim.record_ids)
        door.commit_step(optimizer_step=step, summary={"loss": 1.0})
        return True

    while True:
        if not persist(turn):
            time.sleep(0.02)
            continue
        step += 1
        if step % 8 == 0:
            (folder / "checkpoint.new").write_text(str(step))
            (folder / "checkpoint.new").replace(checkpoint)
            persist(lambda step=step: door.settle_checkpoint(optimizer_step=step))  # type: ignore[misc]


JOBS: Final[dict[str, Callable[[Broker, Path, str], None]]] = {
    "push": push, "match": match, "pack": pack, "learn": learn,
}  # fmt: skip


def run_role(name: str, folder: Path, url: str) -> None:
    log = os.open(folder / "roles.log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    broker = persist(lambda: Broker.connect(RUN, BrokerAddress(url=url), socket_timeout_s=2.0))
    JOBS[name.partition("-")[0]](broker, folder, name)


@dataclass(kw_only=True)
class Books:
    """What became of the rollouts; ``faults`` is empty where nothing was lost, stuck or trained twice."""

    accidents: Counter[str]
    taken: int = 0
    pushed: int = 0
    trained: int = 0
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        rows = {"taken": self.taken, "pushed": self.pushed, "trained": self.trained, **self.accidents}
        lines = [f"{name:<24}{number:>10}" for name, number in rows.items()]
        return "\n".join([*lines, *self.faults, "NOT balanced" if self.faults else "balanced"])


class Torture:
    """One server, one proxy, and the roles as processes, started again whenever they die."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.accidents = folder, random.Random(seed), Counter[str]()
        self.server = EmbeddedRedis.start(folder / "redis", durability="always")
        self.proxy = ChaosProxy(folder / "proxy.sock", self.server.url.removeprefix("unix://"))
        self.direct = Broker.connect(RUN, BrokerAddress(url=self.server.url))
        publish_policy(self.direct, policy_version=0, optimizer_step=0, weights_path="w")
        self.log = folder / "roles.log"
        self.log.touch()
        self.roles: dict[str, BaseProcess] = {}
        self.deaths: list[str] = []

    def keep_alive(self, names: Collection[str] = ROLES) -> None:
        for name in names:
            role = self.roles.get(name)
            if role is not None and role.exitcode not in (None, -signal.SIGKILL):
                self.deaths.append(f"{name} died by itself: {self.log_end()}")
            if role is None or role.exitcode is not None:
                url = socket_url(self.folder / "proxy.sock")
                self.roles[name] = PROCESSES.Process(target=run_role, args=(name, self.folder, url))
                self.roles[name].start()

    def log_end(self) -> str:
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2]

    def accident(self) -> None:
        kind = self.rng.choice(
            ["kill", "kill", "freeze", "hang up", "lose replies", "hold", "full", "server"]
        )
        self.accidents[kind] += 1
        role = self.roles[self.rng.choice(ROLES)]
        pause_s = self.rng.uniform(0.1, 1.0)
        if kind == "kill":
            role.kill()
            role.join()
        elif kind == "freeze":
            os.kill(role.pid or 0, signal.SIGSTOP)
            time.sleep(3 * pause_s)
            os.kill(role.pid or 0, signal.SIGCONT)
        elif kind == "hang up":
            self.proxy.hang_up()
        elif kind == "lose replies":
            self.proxy.lose_replies(self.rng.randint(1, 8))
        elif kind == "hold":
            self.proxy.hold()
            time.sleep(pause_s)
            self.proxy.go_on()
        elif kind == "full":
            self.direct.client.config_set("maxmemory", "1mb")
            time.sleep(pause_s)
            self.direct.client.config_set("maxmemory", "0")
        else:
            self.server.process.kill()
            self.server.process.wait()
            self.server = EmbeddedRedis.start(self.folder / "redis", durability="always")

    def run(self, seconds: float) -> Books:
        self.keep_alive()
        starts_by_s = time.monotonic() + DRAIN_S
        while not self.books().trained:
            assert time.monotonic() < starts_by_s, f"nothing is trained: {self.log_end()}"
            time.sleep(0.2)
        ends_at_s = time.monotonic() + seconds
        while time.monotonic() < ends_at_s:
            self.keep_alive()
            time.sleep(self.rng.uniform(0.1, 0.6))
            self.accident()
        return self.settle()

    def settle(self) -> Books:
        """End the producers, let the others finish, and read the books."""
        ends_at_s = time.monotonic() + DRAIN_S
        for name, role in self.roles.items():
            if name.startswith("push"):
                role.kill()
                role.join()
        while True:
            books = self.books()
            if not books.faults or self.deaths or time.monotonic() > ends_at_s:
                books.faults += self.deaths
                return books
            time.sleep(0.5)
            self.keep_alive({name for name in ROLES if not name.startswith("push")})

    def books(self) -> Books:
        taken = {line for path in self.folder.glob("taken-*") for line in path.read_text().splitlines()}
        pushed, trained = Counter[str](), Counter[str]()
        counters = dict(read_status(self.direct, 1).counters)
        events = list(read_events(self.direct))
        for event in events:
            if event.kind == "pushed":
                pushed.update(row.record_id for row in event.pushed_rows())
            elif event.kind == "claimed":
                trained.update(name for claimed in event.claimed_packs() for name in claimed.record_ids)
        books = Books(accidents=self.accidents, taken=len(taken), pushed=len(pushed), trained=len(trained))
        wrong = {
            "lost": taken - set(pushed),
            "stuck": set(pushed) - set(trained),
            "pushed twice": {name for name, number in pushed.items() if number > 1},
            "trained twice": {name for name, number in trained.items() if number > 1},
        }
        books.faults += [
            f"{what}: {len(names)}, such as {min(names)}" for what, names in wrong.items() if names
        ]
        if not books.faults:
            audit = take_audit(events, counters=counters)
            books.faults += [] if audit.balanced else [*audit.faults, f"audit: difference {audit.difference}"]
        return books

    def close(self) -> None:
        for role in self.roles.values():
            role.kill()
            role.join()
        self.proxy.close()
        self.direct.close()
        self.server.stop()


@contextlib.contextmanager
def torture(seed: int) -> Iterator[Torture]:
    """Yield a torture in a folder of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        running = Torture(Path(folder), seed)
        try:
            yield running
        finally:
            running.close()


def main() -> int:
    seconds, seed = float(os.environ.get("TORTURE_SECONDS", "600")), int(os.environ.get("TORTURE_SEED", "0"))
    with torture(seed) as running:
        books = running.run(seconds)
    sys.stdout.write(f"torture of {seconds:g} s, seed {seed}\n{books.table()}\n")
    return 1 if books.faults else 0
