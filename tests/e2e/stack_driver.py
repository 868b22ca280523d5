"""Runs a stack of fake roles on a real embedded Redis, here or as a program that can be signalled."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from configs import load_config
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_folder import RunFolder
from rollstream.stack.plan import LaunchSettings, RoleName
from rollstream.stack.restart_policy import RestartSettings
from rollstream.stack.running import StackOptions, StackResult, run_stack
from tests.builders.configs import PROJECT_ROOT, make_mapping, write_file

QUICK = RestartSettings(first_delay_s=0.02, longest_delay_s=0.1)


@dataclass
class FakeStack:
    """A run folder to be, and what each role does: ``serve`` where ``behaviours`` does not say."""

    root: Path
    behaviours: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root / "runs" / "test")

    @property
    def config_path(self) -> Path:
        """Write the configuration with the files it names, and return its path."""
        Image.new("RGB", (8, 8)).save(self.root / "image.png")
        sample = {"images": ["image.png"], "width": 8, "height": 8, "objects": []}
        (self.root / "train.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
        mapping = make_mapping(
            run__output_dir=str(self.root / "runs"),
            data__train_jsonl=str(self.root / "train.jsonl"),
            data__val_jsonl=None,
            model__name_or_path=str(SHIPPED_MODEL),
            **self.settings,
        )
        return write_file(self.root, mapping)

    def command(self, name: RoleName, launch: LaunchSettings) -> list[str]:
        """Return the command line of a fake role."""
        url = launch.overrides[-1].removeprefix("broker.url=")
        words = self.behaviours.get(name.role, ["serve"])
        own = [sys.executable, "-m", "tests.e2e.fake_role", url, str(self.root), str(name), *words]
        return ["env", f"PYTHONPATH={PROJECT_ROOT}", *own]

    def run(self, **options: Any) -> tuple[StackResult, str]:
        """Run in this process; return the result and what the operator saw."""
        seen = io.StringIO()
        console = Console(file=seen, width=200)
        path = self.config_path
        given = StackOptions(console=console, live=False, **options)
        result = run_stack(path, load_config(path), given, self.command, QUICK)
        return result, seen.getvalue()

    def start(self) -> subprocess.Popen[str]:
        """Run as a program of its own, as an operator would; its output is one JSON map."""
        plan = json.dumps({"behaviours": self.behaviours, "settings": self.settings})
        return subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.stack_driver", str(self.root), plan],
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def diary(self) -> list[str]:
        """Return what the roles wrote down, in order."""
        path = self.root / "diary"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def pids(self) -> list[int]:
        """Return the process ids of all fake roles that ever ran."""
        return [int(line.split()[-1]) for line in self.diary() if " began " in line]

    def samples(self) -> list[dict[str, Any]]:
        path = self.folder.stack_samples  # a stack that ends within its first second has none yet
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, text: str) -> None:
        """Return when the learner or its rank announces ``text``: ``up``, then ``asked to end``."""
        with (self.root / "announced").open() as announced:
            assert announced.read() == text

    def with_announcement(self) -> FakeStack:
        os.mkfifo(self.root / "announced")
        return self


def main() -> int:
    """Run the stack that the arguments describe: a folder, and a map of what `FakeStack` takes."""
    root, plan = sys.argv[1:]
    result, seen = FakeStack(Path(root), **json.loads(plan)).run()
    sys.stdout.write(json.dumps({"reason": result.reason, "seen": seen}))
    return result.exit_status


if __name__ == "__main__":
    sys.exit(main())
