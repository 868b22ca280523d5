"""The campaign: roles started again whenever they end, seeded accidents, and what the books say then."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.policy import publish_policy
from configs import RunConfig
from rollstream.stack.embedded_redis import Durability, EmbeddedRedis, socket_url
from rollstream.wiring.identity import adopt_on_broker, settle_identity
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.datasets import BOX, POLYGON, dataset_line, write_jsonl, write_picture
from tests.torture.books import Books, read_books
from tests.torture.chaos_proxy import ChaosProxy
from tests.torture.gauges import GaugeFile, process_gauges, server_gauges
from tests.torture.log_fold import LogTap
from tests.torture.roles import LEAVING_NAMES, run_role

# a server that has imported all of this already and only forks: a killed role is back at once
PROCESSES: Final = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.torture.campaign"])
MAKERS: Final = ("dispatch", "produce-0", "produce-1")
ROLES: Final = (*MAKERS, "match-0", "match-1", "pack", "archive", "learn-0", "learn-1")
# one of a run: while it is frozen another may take its place
SOLE: Final = ("dispatch", "pack", "archive")
SUBSTITUTE_AFTER_S: Final = 5.0
THAWED_LEAVES_IN_S: Final = 25.0
MOST_FROZEN: Final = 2
DRAIN_S: Final = 90.0
SAMPLE_EVERY_S: Final = 5.0
ACCIDENTS: Final = (
    *("kill", "kill", "kill", "freeze", "freeze", "hang up", "lose replies", "cut replies", "delay", "hold"),
    *("hole", "memory full", "disk full", "archive disk full", "kill server", "kill server", "freeze server"),
)
# the disk is full where a file may not grow; the signal that says so would end the server
PATIENT_WITH_DISK: Final = ("/bin/sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh")


def make_config(folder: Path, url: str) -> RunConfig:
    """Return the configuration of the run, its data set beside it."""
    data, root, rng = folder / "data", Path(__file__).parents[2], random.Random(5)
    write_picture(data / "images" / "one.png")
    lines = [dataset_line(objects=rng.choices((BOX, POLYGON), k=rng.randint(0, 6))) for _ in range(48)]
    train = write_jsonl(data / "train.jsonl", lines)
    mapping = make_mapping(
        run__name="torture",
        run__output_dir=str(folder / "runs"),
        data={"train_jsonl": str(train)},
        model__name_or_path=str(root / "rollstream" / "assets" / "scenes_tiny"),
        stage2_ab__schedule__b_ratio=1.0,
        stage2_async__queue_limit=16,
        stage2_async__prefetch_target_packs=8,
        stage2_async__sync_every_steps=8,
        training__global_max_length=512,
        training__effective_batch_size=8,
        broker__url=url,
        metrics__base_port=0,
        producers__lease_s=5.0,
        producers__job_timeout_s=60,
    )
    return load_mapping(folder, mapping)


class Torture:
    """One server, one proxy, and the roles as processes. ``durability`` always: nothing may be lost."""

    def __init__(
        self, folder: Path, seed: int, durability: Durability, *, longest_s: float, sockets: Path
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.rng, self.durability = folder, random.Random(seed), durability
        self.longest_s, self.longest_pause_s = longest_s, min(2.0, longest_s / 4)
        self.accidents, self.leavings = Counter[str](), Counter[str]()
        self.server = self._start_server()
        self.proxy = ChaosProxy(sockets / f"{durability}.sock", self._server_path, seed)
        self.config = make_config(folder, socket_url(sockets / f"{durability}.sock"))
        self.direct = Broker.connect(self.config.run.name, BrokerAddress(url=self.server.url))
        adopt_on_broker(self.config, self.direct, settle_identity(self.config))
        publish_policy(self.direct, policy_version=0, optimizer_step=0, weights_path="w")
        self.tap = LogTap(self.server.url, self.direct.keys.named("events"))
        self.log = folder / "roles.log"
        self.log.touch()
        self.roles: dict[str, BaseProcess] = {}
        self.thaws: list[tuple[float, BaseProcess, str]] = []
        self.thawed: list[tuple[float, BaseProcess, str]] = []
        self.undo: list[tuple[float, Callable[[], object]]] = []
        self.deaths: list[str] = []
        self.gauges = GaugeFile(folder / "gauges.jsonl")
        self._sampled_at_s = 0.0
        self._began_s = time.monotonic()

    @property
    def _server_path(self) -> str:
        return self.server.url.removeprefix("unix://")

    def _start_server(self) -> EmbeddedRedis:
        return EmbeddedRedis.start(
            self.folder / "redis", durability=self.durability, command_prefix=PATIENT_WITH_DISK
        )

    # -- the roles --------------------------------------------------------------------------------------

    def keep_alive(self, names: tuple[str, ...] = ROLES) -> None:
        """Start what is not there, bring back what was frozen long enough, note who left and why."""
        now_s = time.monotonic()
        for due in [item for item in self.thaws if item[0] <= now_s]:
            self.thaws.remove(due)
            self._thaw(due[1], due[2], now_s)
        for due in [item for item in self.thawed if item[0] <= now_s or item[1].exitcode is not None]:
            self.thawed.remove(due)
            self._note_leaving(due[2], due[1], kills=True)
        for item in [item for item in self.undo if item[0] <= now_s]:
            self.undo.remove(item)
            item[1]()
        if self.server.process.poll() is not None:
            self.accidents["server ended by itself"] += 1
            self.server = self._start_server()
        for name in names:
            role = self.roles.get(name)
            if role is not None and role.exitcode is not None:
                self._note_leaving(name, role)
            if role is None or role.exitcode is not None:
                self.roles[name] = self._start(name)
        self._sample(now_s)

    def _start(self, name: str) -> BaseProcess:
        process = PROCESSES.Process(target=run_role, args=(name, self.config, self.folder))
        process.start()
        return process

    def _note_leaving(self, name: str, role: BaseProcess, *, kills: bool = False) -> None:
        if kills and role.exitcode is None:
            role.kill()
            role.join()
        if role.exitcode == -signal.SIGKILL:
            return
        why = LEAVING_NAMES.get(role.exitcode or 0)
        self.leavings[f"{name.partition('-')[0]}: {why or role.exitcode}"] += 1
        if why is None:
            self.deaths.append(f"{name} died by itself ({role.exitcode}): {self.log_end()}")

    def _thaw(self, role: BaseProcess, name: str, now_s: float) -> None:
        if role.exitcode is None:
            os.kill(role.pid or 0, signal.SIGCONT)
        if self.roles.get(name) is not role:
            self.thawed.append((now_s + THAWED_LEAVES_IN_S, role, name))

    def log_end(self) -> str:
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2]

    def _sample(self, now_s: float) -> None:
        if now_s - self._sampled_at_s < SAMPLE_EVERY_S:
            return
        self._sampled_at_s = now_s
        sample = server_gauges(self.direct.client, self.direct.keys)
        for name, role in self.roles.items():
            sample |= process_gauges(name, role.pid or 0)
        self.gauges.write(now_s - self._began_s, sample | process_gauges("server", self.server.process.pid))

    # -- the accidents ----------------------------------------------------------------------------------

    def accident(self) -> None:
        kind = self.rng.choice(ACCIDENTS)
        self.accidents[kind] += 1
        getattr(self, "_" + kind.replace(" ", "_"))(self.rng.uniform(0.1, 1.0))

    def _role(self) -> tuple[str, BaseProcess]:
        frozen = [role for _, role, _ in self.thaws]
        name = self.rng.choice([name for name in ROLES if self.roles[name] not in frozen] or ["learn-0"])
        return name, self.roles[name]

    def _kill(self, _: float) -> None:
        _, role = self._role()
        role.kill()
        role.join()

    def _freeze(self, _: float) -> None:
        name, role = self._role()
        if role.exitcode is not None or len(self.thaws) == MOST_FROZEN:
            return
        # few are long: most of a campaign would pass frozen otherwise
        pause_s = max(0.2, self.longest_s * self.rng.random() ** 8)
        os.kill(role.pid or 0, signal.SIGSTOP)
        self.thaws.append((time.monotonic() + pause_s, role, name))
        self.accidents["seconds frozen"] += round(pause_s)
        if name in SOLE and pause_s > SUBSTITUTE_AFTER_S:
            self.accidents["substituted"] += 1
            self.roles[name] = self._start(name)

    def _hang_up(self, _: float) -> None:
        self.proxy.hang_up()

    def _lose_replies(self, _: float) -> None:
        self.proxy.lose_replies(self.rng.randint(1, 8))

    def _cut_replies(self, _: float) -> None:
        self.proxy.cut_replies(self.rng.randint(1, 8))

    def _delay(self, seconds: float) -> None:
        self.proxy.delay(seconds / 10)
        self._later(3 * seconds, self.proxy.go_on)

    def _hold(self, seconds: float) -> None:
        self.proxy.hold()
        self._later(seconds, self.proxy.go_on)

    def _hole(self, seconds: float) -> None:
        self.proxy.make_hole()
        self._later(seconds, self.proxy.go_on)

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        self.undo.append((time.monotonic() + seconds, act))

    def _memory_full(self, seconds: float) -> None:
        self._configure("maxmemory", "1mb")
        self._later(3 * seconds, lambda: self._configure("maxmemory", "0"))

    def _configure(self, name: str, value: str) -> None:
        with contextlib.suppress(redis.RedisError):  # one that died is started with what it had at first
            self.direct.client.config_set(name, value)

    def _disk_full(self, seconds: float) -> None:
        self._fill_disk(self.server.process.pid, self.folder / "redis", seconds)

    def _archive_disk_full(self, seconds: float) -> None:
        self._fill_disk(self.roles["archive"].pid or 0, self.folder / "runs", seconds)

    def _fill_disk(self, pid: int, folder: Path, seconds: float) -> None:
        """Let no file of a process grow beyond the largest that it has."""
        largest = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
        limit(pid, largest)
        self._later(2 * seconds, lambda: limit(pid, resource.RLIM_INFINITY))

    def _kill_server(self, _: float) -> None:
        self.server.process.kill()
        self.server.process.wait()
        self.server = self._start_server()

    def _freeze_server(self, _: float) -> None:
        pause_s, server = self.rng.uniform(0.1, self.longest_s / 6), self.server
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(pause_s)
        os.kill(server.process.pid, signal.SIGCONT)

    def restore_older_file(self, seconds: float) -> None:
        """Kill the server and start it with its files as they were some seconds ago."""
        kept, files = self.folder / "redis-older", self.folder / "redis"
        self._configure("auto-aof-rewrite-percentage", "0")
        shutil.copytree(files, kept, ignore=shutil.ignore_patterns("*.sock"))
        self._live(seconds, calm=True)
        self.server.process.kill()
        self.server.process.wait()
        for path in files.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.is_socket():
                path.unlink()
        shutil.copytree(kept, files, dirs_exist_ok=True)
        shutil.rmtree(kept)
        self.server = self._start_server()
        self.accidents["restore older file"] += 1

    # -- the campaign -----------------------------------------------------------------------------------

    def run(self, seconds: float) -> Books:
        self.keep_alive()
        self._wait_for_training()
        began_s = time.monotonic()
        if self.durability == "everysec":
            for _ in range(2 if seconds > 60 else 1):
                self._live(seconds / 4)
                self.restore_older_file(min(5.0, seconds / 2))
        self._live(began_s + seconds - time.monotonic())
        return self.settle()

    def _wait_for_training(self) -> None:
        starts_by_s = time.monotonic() + DRAIN_S
        while not self.tap.num_trained:
            assert time.monotonic() < starts_by_s, f"nothing is trained: {self.log_end()}"
            self.keep_alive()
            time.sleep(0.1)

    def _live(self, seconds: float, *, calm: bool = False) -> None:
        ends_at_s = time.monotonic() + seconds
        while time.monotonic() < ends_at_s:
            self.keep_alive()
            if calm:
                time.sleep(0.1)
                continue
            time.sleep(self.rng.uniform(0.1, self.longest_pause_s))
            self.accident()

    def settle(self) -> Books:
        """End the producers, let the others finish, and read the books."""
        ends_at_s = time.monotonic() + DRAIN_S
        for _, act in self.undo:
            act()
        self.undo.clear()
        for _, role, name in self.thaws:
            self._thaw(role, name, time.monotonic())
        self.thaws.clear()
        for name in MAKERS:
            self.roles[name].kill()
            self.roles[name].join()
        names = tuple(name for name in ROLES if name not in MAKERS)
        while True:
            self.keep_alive(names)
            time.sleep(0.5)
            books = self.read_books()
            if not books.faults or time.monotonic() > ends_at_s:
                break
        self.end_roles()
        self.tap.catch_up()
        books = self.read_books(is_over=True)
        books.faults += [*self.deaths, *self.gauges.growth()]
        books.accidents, books.leavings = self.accidents, self.leavings
        return books

    def read_books(self, *, is_over: bool = False) -> Books:
        """Return what the log says now; ``is_over``: all roles have ended."""
        is_lossless = self.durability == "always"
        return read_books(self.folder, self.direct, self.tap, lossless=is_lossless, is_over=is_over)

    def end_roles(self) -> None:
        """Ask all to end, but for ranks, which wait for packs; the archive goes on to the log's end first."""
        for name, role in self.roles.items():
            role.kill() if name.startswith("learn") else role.terminate()
        for role in self.roles.values():
            role.join(timeout=15)

    def close(self) -> None:
        everyone = [*self.roles.values(), *(item[1] for item in (*self.thaws, *self.thawed))]
        for role in everyone:
            role.kill()
            role.join()
        self.tap.close()
        self.proxy.close()
        self.direct.close()
        self.server.stop()


def limit(pid: int, num_bytes: int) -> None:
    """Bound the files of a process; one that is gone needs no bound."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@contextlib.contextmanager
def torture(
    folder: Path, seed: int, durability: Durability = "always", *, longest_s: float = 3.0
) -> Iterator[Torture]:
    """Yield a torture whose files lie in ``folder``; its processes are gone afterwards."""
    # a socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="torture-") as sockets:
        running = Torture(folder, seed, durability, longest_s=longest_s, sockets=Path(sockets))
        try:
            yield running
        finally:
            running.close()


def main() -> int:
    """Torture for MINUTES, half of them on each durability; return 1 where the books do not balance."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    minutes, seed = float(os.environ.get("MINUTES", "20")), int(os.environ.get("SEED", "0"))
    home = Path("runs") / f"torture-{seed}"
    shutil.rmtree(home, ignore_errors=True)
    durabilities: tuple[Durability, ...] = ("always", "everysec")
    num_faults, seconds = 0, 60 * minutes / len(durabilities)
    for durability in durabilities:
        folder = home / durability
        with torture(folder, seed, durability, longest_s=min(120.0, seconds / 6)) as running:
            books = running.run(seconds)
        num_faults += len(books.faults)
        sys.stdout.write(
            f"torture of {seconds:g} s with appendfsync {durability}, seed {seed}\n{books.table()}\n"
            f"gauges and logs in {folder}\n\n"
        )
        sys.stdout.flush()
    return 1 if num_faults else 0
