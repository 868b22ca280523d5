"""What every end-to-end test starts from: small scenes, a tiny model, and the program itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.records.ledger import Ledger
from rollstream.datasets.scenes import make_scenes
from rollstream.history.archive_reading import read_archived_events
from rollstream.models.tiny_model import make_tiny_model
from rollstream.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, num_train=48, num_val=8, seed=5)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder, seed=3)
    return folder


@dataclass
class Program:
    """The program as a user runs it, on data and a model of the test's own."""

    workdir: Path
    scenes: Path
    tiny_model: Path
    environment: dict[str, str] = field(default_factory=dict)

    def overrides(self, *changes: str) -> list[str]:
        """Return ``--set`` arguments: the test's inputs, a short rollout, then ``changes``."""
        values = (
            f"data.train_jsonl={self.scenes / 'train.jsonl'}",
            f"data.val_jsonl={self.scenes / 'val.jsonl'}",
            f"model.name_or_path={self.tiny_model}",
            f"run.output_dir={self.workdir / 'runs'}",
            "custom.extra.rollout_matching.max_new_tokens=48",
            *changes,
        )
        return [part for value in values for part in ("--set", value)]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "rollstream.commands.program", *arguments]

    def run(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it printed."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env={**os.environ, **self.environment, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def up(self, config: str, name: str, *changes: str, steps: int) -> RunFolder:
        """Run a whole stack to its end and return its folder; fails with its output otherwise."""
        done = self.run(
            "up", f"configs/{config}", "--steps", str(steps), *self.overrides(f"run.name={name}", *changes)
        )
        folder = RunFolder(self.workdir / "runs" / name)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{last_lines(folder)}"
        return folder

    def audit(self, folder: RunFolder) -> dict[str, Any]:
        """Return the audit of a run, as ``rollstream audit --json`` prints it."""
        done = self.run("audit", str(folder.path), "--json")
        return dict(json.loads(done.stdout))


def last_lines(folder: RunFolder, num_lines: int = 15) -> str:
    """Return the end of every role's log."""
    logs: Sequence[Path] = sorted(folder.logs_dir.glob("*.log"))
    return "\n".join(
        f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
        for log in logs
    )


def ledger_of(folder: RunFolder) -> Ledger:
    """Return the fold of a run's archived log."""
    return Ledger().apply(read_archived_events(folder.archive_dir))


@pytest.fixture
def program(tmp_path: Path, scenes: Path, tiny_model: Path) -> Program:
    return Program(tmp_path, scenes, tiny_model)


@pytest.fixture
def make_program(
    tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_model: Path
) -> Callable[[], Program]:
    return lambda: Program(tmp_path_factory.mktemp("work"), scenes, tiny_model)
