"""What every command says: how it is asked, how it ends, and no traceback for what a user can cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learner.stop_request import StopRequest
from learner.train_loop import FINISHED, STOP_REQUESTED, LearnerOutcome
from rollstream.commands.program import main
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.stack import learning
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


@pytest.mark.req("U-2")
@pytest.mark.parametrize(
    "reason, number, status",
    [(FINISHED, None, 0), (FINISHED, 15, 0), (STOP_REQUESTED, 15, 143), (STOP_REQUESTED, 2, 130)]
    + [(STOP_REQUESTED, None, 143)],
)
def test_a_rank_under_torchrun_ends_with_what_stopped_the_run(
    reason: str, number: int | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: object, stop: StopRequest, *, is_first: bool) -> LearnerOutcome:
        stop.signal_number = number
        return LearnerOutcome(optimizer_step=3, reason=reason)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(learning, "run_rank", stopped)
    config = write_file(tmp_path, make_mapping(run__output_dir=str(tmp_path)))
    assert learning.learn_or_spawn(config, ()) == status


def test_text_of_a_path_is_neither_markup_nor_obeyed_by_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "[" / "x] \x1b[31m"
    odd.mkdir(parents=True)
    for words in (
        ["data", "import", "voc", str(odd), str(tmp_path / "out")],
        ["data", "show", str(odd)],
        ["report", str(odd)],
        ["audit", str(odd), "--sample", "[/x]"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        assert ended.value.code == 2, (words, said)
        assert "[/x] " in said, "shown as it is"
        assert "\x1b[31m" not in said, "made visible"
