"""Every wait ends: a rank that dies, a queue without producers, a broker gone for good, each by its name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.status import read_status
from broker_schemas.records.ledger import Ledger
from rollstream.run_folder import RunFolder, read_json_lines
from rollstream.stack.embedded_redis import EmbeddedRedis
from rollstream.stack.process_tree import kill_tree
from tests.e2e.conftest import ROOT, Program
from tests.e2e.killing import descendants_of

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
STALL_TIMEOUT_S = 15
# what a process needs to end after its deadline: torchrun looks at its ranks, the rest is a slow machine
ENDS_WITHIN_S = STALL_TIMEOUT_S + 45
STOPPED_STATUS = 3


@dataclass
class RolesByHand:
    """Roles started one by one on a server of the test's own, as on machines of one's own."""

    program: Program
    server: EmbeddedRedis
    name: str
    config: str
    changes: Sequence[str] = ()
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.program.workdir / "runs" / self.name)

    def log_path(self, role: str) -> Path:
        return self.program.workdir / f"{role}.log"

    def start(self, role: str) -> subprocess.Popen[bytes]:
        overrides = self.program.overrides(
            f"run.name={self.name}",
            f"broker.url={self.server.url}",
            "training.effective_batch_size=4",
            "training.per_device_train_batch_size=2",
            "archive.enabled=false",
            *self.changes,
        )
        with self.log_path(role).open("ab") as log:
            process = subprocess.Popen(
                self.program.command(role, f"configs/{self.config}", *overrides),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def log(self, role: str = "learn") -> str:
        return self.log_path(role).read_text(errors="replace")

    def broker(self) -> Broker:
        return Broker.connect(self.name, BrokerAddress(url=self.server.url))

    def ranks_of(self, learner: subprocess.Popen[bytes]) -> dict[int, int]:
        """Return the process id of each rank that runs."""
        found = {}
        for pid in descendants_of(learner.pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                names = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                ranks = [word.removeprefix("RANK=") for word in words if word.startswith("RANK=")]
                if ranks and "rollstream.commands.program" in names:
                    found[int(ranks[0])] = pid
        return found

    def wait_for_steps(self, num_steps: int) -> None:
        """Return once so many steps were logged; fails when the learner ends before."""
        learner, give_up_at = self.started[0], time.monotonic() + 120
        while len(read_json_lines(self.folder.train_log)) < num_steps:
            assert learner.poll() is None, self.log()
            assert time.monotonic() < give_up_at, self.log()
            time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    started = EmbeddedRedis.start(tmp_path / "redis", durability="none")
    yield started
    started.stop()


@pytest.fixture
def roles(program: Program, server: EmbeddedRedis) -> Iterator[RolesByHand]:
    by_hand = RolesByHand(
        program,
        server,
        "deadlines",
        "stage2_async/local.yaml",
        (f"stage2_async.stall_timeout_s={STALL_TIMEOUT_S}", "training.save_every_steps=100"),
    )
    yield by_hand
    for process in by_hand.started:
        if process.poll() is None:
            kill_tree(process.pid)
            process.wait()


def reasons(log: str) -> set[str]:
    """Return what the ranks said at their end, in one line each."""
    return {line.removeprefix("rollstream: ") for line in log.splitlines() if line.startswith("rollstream: ")}


@pytest.mark.req("Q-11")
def test_the_other_rank_leaves_and_names_the_one_that_was_killed(roles: RolesByHand) -> None:
    learner = roles.start("learn")
    roles.wait_for_steps(2)

    os.kill(roles.ranks_of(learner)[1], signal.SIGKILL)

    assert learner.wait(timeout=ENDS_WITHIN_S) == 128 + signal.SIGKILL
    (reason,) = reasons(roles.log())
    assert "rank 1 did not arrive within" in reason
    assert "resume from the last checkpoint" in reason


@pytest.mark.req("Q-11", "V-2")
def test_an_on_policy_run_without_a_producer_stops_with_that_reason(roles: RolesByHand) -> None:
    """Given learner and dispatcher of the micro scope, when nobody runs the jobs that are asked for."""
    roles.config = "rollout_matching/micro.yaml"
    roles.changes = (f"stage2_async.stall_timeout_s={STALL_TIMEOUT_S}",)
    learner = roles.start("learn")
    roles.start("dispatch")

    assert learner.wait(timeout=ENDS_WITHIN_S + 60) == STOPPED_STATUS, roles.log()

    (reason,) = reasons(roles.log())
    assert reason.startswith("optimizer step 0: its rollouts did not come within 13.5 s")
    assert "are producers, matchers and the packer running?" in reason
    assert roles.log().count(reason) >= 2, "both ranks say the same"
    broker = roles.broker()
    assert read_status(broker, 2).total("open_records") == 4
    broker.close()


@pytest.mark.req("Q-7", "Q-11")
def test_stage2_async_without_a_producer_goes_on_with_a_steps_and_counts_what_it_skipped(
    roles: RolesByHand,
) -> None:
    roles.changes = (*roles.changes, "training.max_steps=6")

    assert roles.start("learn").wait(timeout=120) == 0, roles.log()

    broker = roles.broker()
    status, ledger = read_status(broker, 2), Ledger().apply(read_events(broker))
    broker.close()
    assert (status.total("steps:A"), status.total("steps:B")) == (6, 0)
    assert status.total("claims:queue_short") == 3
    assert [step.reason for _, step in sorted(ledger.steps.items())] == 3 * ["schedule", "queue_short"]
    rows = read_json_lines(roles.folder.train_log)
    assert [row["reason"] for row in rows] == 3 * ["schedule", "queue_short"]


@pytest.mark.req("Q-11")
def test_a_broker_that_is_gone_for_good_ends_all_ranks_with_one_reason(
    roles: RolesByHand, server: EmbeddedRedis
) -> None:
    learner = roles.start("learn")
    roles.wait_for_steps(2)

    server.process.kill()

    assert learner.wait(timeout=ENDS_WITHIN_S) == STOPPED_STATUS, roles.log()
    (reason,) = reasons(roles.log())
    assert re.match(r"broker: it did not come back within 1[\d.]+ s", reason), reason
    assert roles.log().count(reason) >= 2, "both ranks say the same"


@pytest.mark.req("Q-11", "Q-1")
def test_a_broker_that_hangs_and_comes_back_in_time_costs_no_step(
    roles: RolesByHand, server: EmbeddedRedis
) -> None:
    """Given a broker that hangs for longer than any single try, when it goes on before the deadline."""
    roles.changes = (*roles.changes, "training.max_steps=8")
    learner = roles.start("learn")
    roles.wait_for_steps(2)

    os.kill(server.process.pid, signal.SIGSTOP)
    with suppress(subprocess.TimeoutExpired):
        learner.wait(timeout=4)
    os.kill(server.process.pid, signal.SIGCONT)

    assert learner.wait(timeout=120) == 0, roles.log()
    rows = read_json_lines(roles.folder.train_log)
    assert [row["optimizer_step"] for row in rows] == list(range(8))
