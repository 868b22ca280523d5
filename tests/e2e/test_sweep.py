"""A sweep for real: two cells of a tiny model, and a second call that runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollstream.run_folder import RunFolder
from tests.e2e.conftest import Program, last_lines

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
GRID = "blocks:\n- title: share\n  product: {stage2_ab.schedule.b_ratio: [0, 0.5]}\n"
SMALL_STEP = ("training.effective_batch_size=8", "training.per_device_train_batch_size=2")
CHANGES = (*SMALL_STEP, "evaluation.num_samples=2", "training.save_every_steps=2")


def arguments(program: Program, *changes: str, steps: int = 4) -> list[str]:
    grid = program.workdir / "grid.yaml"
    grid.write_text(GRID, encoding="utf-8")
    return [
        *("sweep", "configs/stage2_async/local.yaml", "--grid", str(grid), "--steps", str(steps), "--json"),
        *("--output", str(program.workdir / "swept")),
        *program.overrides(*CHANGES, *changes),
    ]


def swept(program: Program, *changes: str) -> dict[str, Any]:
    done = program.run(*arguments(program, *changes))
    logs = "\n".join(last_lines(RunFolder(path)) for path in (program.workdir / "swept").glob("swept-*"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return dict(json.loads(done.stdout))


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}


@pytest.mark.req("O-7")
def test_a_sweep_measures_every_cell_once_and_goes_on_where_it_was_stopped(program: Program) -> None:
    first = swept(program)

    assert first["num_run"] == 2
    none, half = (cell["numbers"] for cell in first["cells"])
    assert [cell["state"] for cell in first["cells"]] == ["done", "done"]
    assert (none["num_steps"], none["num_b_steps"], none["num_skipped"]) == (4, 0, 0)
    assert half["num_steps"] == 4
    assert half["num_b_steps"] + half["num_skipped"] == 2
    for numbers in (none, half):
        assert numbers["balanced"]
        assert numbers["tokens_per_s"] > 0
        assert 0 <= numbers["f1"] <= 1
        assert 0 <= numbers["idle_share"] < 1
    page = (program.workdir / "swept" / "sweep.html").read_text("utf-8")
    assert page.count("<svg") >= 8

    before = written_at(program.workdir)
    second = swept(program)
    assert second["num_run"] == 0
    assert second["cells"] == first["cells"]
    assert written_at(program.workdir) == before

    # one summary lost, as by a kill between the run and its end: that cell alone is measured again
    (program.workdir / "swept" / "cells" / "b-ratio-0-5.json").unlink()
    third = swept(program)
    assert third["num_run"] == 1
    assert third["cells"][0] == first["cells"][0]
    assert third["cells"][1]["numbers"]["num_steps"] == 4


@pytest.mark.req("O-7")
def test_a_sweep_refuses_a_folder_of_other_settings_and_a_cell_that_cannot_be(program: Program) -> None:
    folder = program.workdir / "swept" / "swept-b-ratio-0-5"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text("run: {name: other}\n", encoding="utf-8")

    begun = program.run(*arguments(program))
    impossible = program.run(*arguments(program, "stage2_async.version_window=-1"))

    assert (begun.returncode, impossible.returncode) == (2, 2)
    assert "cell b-ratio-0-5" in begun.stderr
    assert "give another --output" in begun.stderr
    assert "stage2_async.version_window" in impossible.stderr
    assert list((program.workdir / "swept").iterdir()) == [folder]
