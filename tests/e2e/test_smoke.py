"""The smoke run leaves the same artefacts twice; a rollout of a run can be looked at."""

from __future__ import annotations

import json

import pytest

from rollstream.run_folder import RunFolder
from tests.e2e.conftest import Program


@pytest.mark.req("M-14", "M-12")
@pytest.mark.timeout(240)
def test_two_smoke_runs_leave_the_same_counters_and_worked_examples(program: Program) -> None:
    found = []
    for name in ("one", "two"):
        done = program.run(
            "smoke", "configs/demo.yaml", "--num-samples", "4", *program.overrides(f"run.name={name}")
        )
        assert done.returncode == 0, done.stderr
        folder = RunFolder(program.workdir / "runs" / name).path / "smoke"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found.append(
            {
                name: data.replace(b"one-smoke", b"two-smoke")
                for name, data in files.items()
                if name != "resolved.yaml"
            }
        )
        assert "resolved.yaml" in files
    assert found[0] == found[1]
    assert {"counters.json", "example-0.txt", "example-0.png"} <= set(found[0])
    counters = json.loads(found[0]["counters.json"])
    assert counters["rollouts"] == 4
    assert counters["counters"]["matched"] + counters["counters"]["unmatched_appended"] > 0
