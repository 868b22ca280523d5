"""A stack that is killed at seeded moments: who dies, and how the stack comes back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rollstream.run_folder import RunFolder, read_json_lines
from tests.e2e.conftest import ROOT, Program

LEARNER_TARGETS: Final = ("one rank", "all ranks", "stack")
PIPELINE_TARGETS: Final = ("produce", "match", "pack", "dispatch", "archive")


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, none when it is gone."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in found.split()]


def descendants_of(pid: int) -> list[int]:
    """Return all processes below one."""
    below = children_of(pid)
    return below + [deeper for child in below for deeper in descendants_of(child)]


@dataclass
class KilledStack:
    """Runs ``rollstream up`` until it is done, started again whenever it was killed whole."""

    program: Program
    folder: RunFolder
    arguments: tuple[str, ...]
    random: random.Random
    killed: list[str] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.program.workdir / "up.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                self.program.command("up", *self.arguments),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def is_done(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    @property
    def exit_status(self) -> int | None:
        return None if self._process is None else self._process.returncode

    def num_steps_logged(self) -> int:
        return len(read_json_lines(self.folder.train_log))

    def wait_for_steps(self, num_more: int, timeout_s: float = 120) -> None:
        """Return once ``num_more`` further steps were logged, or the stack ended."""
        wanted, give_up_at = self.num_steps_logged() + num_more, time.monotonic() + timeout_s
        while self.num_steps_logged() < wanted and not self.is_done:
            assert time.monotonic() < give_up_at, f"no step in {timeout_s} s after {self.killed}"
            time.sleep(0.05)

    def wait_for_end(self, timeout_s: float = 600) -> None:
        """Return once the stack has ended."""
        assert self._process is not None
        self._process.wait(timeout=timeout_s)

    def kill(self, target: str) -> None:
        """SIGKILL ``target`` now; a whole stack is started again at once."""
        assert self._process is not None
        if target == "stack":
            self._process.kill()
            self._process.wait()
            self.killed.append(target)
            self.start()
            return
        victims = self._victims(target)
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if victims:
            self.killed.append(target)

    def _victims(self, target: str) -> list[int]:
        assert self._process is not None
        found = []
        for pid in descendants_of(self._process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            is_rank = (
                "learn" in words
                and "rollstream.commands.program" in words
                and "rollstream.stack.learner_launcher" not in words
            )
            if (is_rank and target.endswith(("rank", "ranks"))) or (
                target in words and "rollstream.commands.program" in words
            ):
                found.append(pid)
        if target == "one rank" and found:
            return [self.random.choice(found)]
        return found
