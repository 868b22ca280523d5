"""`rollstream top` in a real terminal of 80 by 24: what is seen, and the terminal it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rollstream.run_folder import RunFolder
from tests.builders.run_folders import START_MS, make_run_folder, make_sample, make_step, write_json_lines
from tests.e2e.conftest import ROOT

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
COLUMNS, LINES = 80, 24
WAIT_S = 100.0


@dataclass
class Pane:
    """One tmux server of its own with one shell of 80 by 24."""

    socket: Path

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self.socket), "-f", os.devnull, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        return done.stdout

    def open(self) -> None:
        size = ("-x", str(COLUMNS), "-y", str(LINES))
        shell = "env PS1='ready> ' LC_ALL=C.UTF-8 TERM=screen-256color sh"
        self.tmux("new-session", "-d", *size, "-c", str(ROOT), shell)
        self.tmux("set-option", "-g", "status", "off")
        self.tmux("resize-window", *size)

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def lines(self) -> list[str]:
        """Return what stands on the screen, line by line, as tmux shows it."""
        return self.tmux("capture-pane", "-p").split("\n")[:LINES]

    def wait_for(self, *words: str) -> list[str]:
        """Return the screen once it shows all the words; fails with the screen when it never does."""
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            lines = self.lines()
            if all(any(word in line for line in lines) for word in words):
                return lines
            time.sleep(0.1)
        raise AssertionError(f"never seen: {words}\n" + "\n".join(self.lines()))

    def is_on_a_screen_of_its_own(self) -> bool:
        return self.tmux("display-message", "-p", "#{alternate_on}").strip() == "1"

    def shows_cursor(self) -> bool:
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"


@pytest.fixture
def pane(tmp_path: Path) -> Iterator[Pane]:
    """A pane; without tmux this skips on a laptop and fails in CI."""
    if shutil.which("tmux") is None:
        if os.environ.get("CI"):
            pytest.fail("no tmux: install it, apt-get install tmux")
        pytest.skip("no tmux: install it, apt-get install tmux")
    opened = Pane(tmp_path / "tmux.sock")
    opened.open()
    yield opened
    opened.tmux("kill-server")


def as_if_running_now(folder: RunFolder, **changes: Any) -> RunFolder:
    """Move a run's times to now, so that its last sample is not an old one; ``changes`` go into that one."""
    shift_ms = int(time.time() * 1000) + 600_000 - (START_MS + 149_000)
    for path in (folder.stack_samples, folder.train_log):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            row["time_ms"] += shift_ms
        if path == folder.stack_samples:
            rows[-1] |= changes
        write_json_lines(path, rows)
    return folder


def start_top(pane: Pane, folder: RunFolder) -> None:
    command = [sys.executable, "-m", "rollstream.commands.program", "top", str(folder.path)]
    pane.type("clear; " + shlex.join(command), "Enter")


def assert_framed(lines: list[str]) -> None:
    """Every line of the picture stands between the frame's sides: none is cut off, none has wrapped."""
    drawn = [line for line in lines if line.strip()]
    assert all(len(line) <= COLUMNS for line in lines)
    assert drawn[0].startswith("╭─ rollstream · ")
    assert drawn[0].endswith("╮")
    assert drawn[-1].startswith("╰")
    assert drawn[-1].endswith("╯")
    for line in drawn[1:-1]:
        assert line.startswith("│ "), line
        assert line.endswith(" │"), line
    assert {len(line) for line in drawn} == {COLUMNS}


def cells_under(lines: list[str], *titles: str) -> list[list[str]]:
    """Return the words of each row of the table whose head holds the titles, down to the frame or a blank."""
    head = next(at for at, line in enumerate(lines) if all(title in line for title in titles))
    rows = []
    for line in lines[head + 2 :]:
        if not line.strip("│ ") or line.startswith("╰"):
            break
        rows.append(line.strip("│ ").split())
    return rows


def test_an_operator_reads_depths_lag_decisions_and_who_waits_at_80_by_24(pane: Pane, tmp_path: Path) -> None:
    folder = as_if_running_now(make_run_folder(tmp_path), ready_depth=[3, 0], segments_waiting=90)
    start_top(pane, folder)

    lines = pane.wait_for("rollstream · scenes-demo · stage2_async", "because")

    assert_framed(lines)
    text = "\n".join(lines)
    assert "…" not in text
    assert "learner waits for the matcher: 90 rollouts are not matched yet (depth 3/0)" in text
    assert "60 of 60" in text
    flow = next(line for line in lines if "(limit 8)" in line).split()
    assert flow[flow.index("(limit") - 2 : flow.index("(limit")] == ["3", "0"]
    (lag,) = (line for line in lines if "lag claimed" in line)
    assert "(max " in lag
    assert "dropped" in text
    assert "stale_on_claim" in text
    decisions = cells_under(lines, "step", "because")
    assert len(decisions) >= 6
    logged = [json.loads(line) for line in folder.train_log.read_text("utf-8").splitlines()][
        -len(decisions) :
    ]
    assert [row[:3] for row in decisions] == [
        [str(row["optimizer_step"]), row["kind"], row["reason"]] for row in reversed(logged)
    ]


def test_what_is_written_while_it_runs_appears(pane: Pane, tmp_path: Path) -> None:
    folder = as_if_running_now(make_run_folder(tmp_path, num_steps=20), optimizer_step=20)
    start_top(pane, folder)
    pane.wait_for("20 of 60")

    now_ms = int(time.time() * 1000)
    with folder.train_log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(make_step(20, kind="A", reason="queue_short", time_ms=now_ms)) + "\n")
    with folder.stack_samples.open("a", encoding="utf-8") as stream:
        sample = make_sample(ready_depth=[7, 5], optimizer_step=21, time_ms=now_ms + 600_000)
        stream.write(json.dumps(sample) + "\n")

    lines = pane.wait_for("21 of 60", "queue_short", "7 5 (limit 8)")
    assert_framed(lines)


@pytest.mark.parametrize("key", ["q", "C-c"])
def test_the_terminal_is_left_as_it_was(pane: Pane, tmp_path: Path, key: str) -> None:
    folder = as_if_running_now(make_run_folder(tmp_path))
    start_top(pane, folder)
    pane.wait_for("because")
    assert pane.is_on_a_screen_of_its_own()

    pane.type("x", key)
    pane.wait_for("ready>")
    pane.type("ended=$?; stty -a | grep -q ' echo '; echo left $ended/$?", "Enter")
    lines = pane.wait_for("left 0/0")

    assert not pane.is_on_a_screen_of_its_own()
    assert pane.shows_cursor()
    assert "Traceback" not in "\n".join(lines)
    assert "╭" not in "\n".join(lines)


def test_words_of_a_run_cannot_break_the_picture(pane: Pane, tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path)
    hostile = "\x1b[2J" + "long reason " * 9
    as_if_running_now(folder, dropped={hostile: 123_456, "overflow": 98_765}, rejected={"x" * 90: 5})
    start_top(pane, folder)

    lines = pane.wait_for("because")

    assert_framed(lines[: len([line for line in lines if line.strip()])])
