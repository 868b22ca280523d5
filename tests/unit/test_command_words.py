"""What every command says: how it is asked, how it ends, and no traceback for what a user can cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.stack.learn_progress import StepLines, left_text
from rollstream.stack.plan import role_environment
from tests.builders.configs import make_mapping, write_file
from tests.builders.datasets import dataset_line, write_jsonl, write_picture, write_voc


def rollstream(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "rollstream.commands.program", *words],
        cwd=cwd,
        env=role_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.req("U-2")
def test_version_help_and_completion_are_where_users_look() -> None:
    assert rollstream("--version").stdout.startswith("rollstream ")
    assert "Usage" in rollstream("-h").stdout
    assert "Usage" in rollstream("data", "import", "-h").stdout
    assert "--install-completion" in rollstream("--help").stdout


@pytest.mark.req("U-2")
def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, rollstream.commands.program; "
        "heavy = {'torch', 'transformers', 'redis', 'pydantic', 'numpy', 'yaml', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.req("U-2")
def test_places_that_cannot_be_written_end_with_one_line_and_status_2(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"a": [("RBC", 9, 7, 29, 19)]})
    write_picture(tmp_path / "images" / "one.png")
    write_jsonl(tmp_path / "train.jsonl", [dataset_line()])
    mapping = make_mapping(
        run__output_dir="/proc/nothing",
        data__train_jsonl=str(tmp_path / "train.jsonl"),
        data__val_jsonl=None,
        model__name_or_path=str(SHIPPED_MODEL),
    )
    config = write_file(tmp_path, mapping)
    for words in (
        ("data", "import", "voc", str(source), "/proc/nothing/out"),
        ("data", "scenes", "/proc/nothing/out", "--num-train", "1", "--num-val", "1"),
        ("model", "tiny", "/proc/nothing/out"),
        ("up", str(config)),
        ("learn", str(config)),
    ):
        done = rollstream(*words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), (words, done.stderr)
        assert "/proc/nothing" in done.stderr, done.stderr


def test_steps_are_told_at_once_and_then_now_and_then_with_what_is_left() -> None:
    now, said = [0.0], list[str]()
    lines = StepLines(100, lambda: now[0], said.append)

    for step in range(100):
        lines({"optimizer_step": step, "kind": "A", "reason": "", "loss": 1.0})
        now[0] += 2.0

    assert said[0].startswith("step 1/100 A")
    assert "3 min left" in said[1]
    assert said[-1].startswith("step 100/100")
    assert len(said) == 21
    assert [left_text(seconds) for seconds in (5, 600, 7200)] == ["5 s left", "10 min left", "2.0 h left"]
