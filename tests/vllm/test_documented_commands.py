"""The commands of docs/VLLM.md, as its reader types them: servers in one terminal, the stack in another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollstream.datasets.scenes import make_scenes
from rollstream.run_folder import RunFolder, read_json_lines
from tests.source_tree import ROOT
from tests.vllm.conftest import START_TIMEOUT_S, free_port

NUM_STEPS = 80
METHOD = "custom.extra.rollout_matching"


def documented_commands() -> list[str]:
    """Return the lines of the page's first block without their comments."""
    text = (ROOT / "docs" / "VLLM.md").read_text("utf-8")
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [re.sub(r"\s+#.*$", "", line).strip() for line in block.group(1).splitlines()]


def start(command: str, folder: Path, log: Path, *settings: str) -> subprocess.Popen[bytes]:
    words = command.split()
    assert words.pop(0) == "rollstream"
    overrides = [part for setting in settings for part in ("--set", setting)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "rollstream.commands.program", *words, *overrides],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )


def wait_for_text(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while text not in log.read_text("utf-8", errors="replace"):
        assert process.poll() is None, log.read_text("utf-8", errors="replace")[-3000:]
        assert time.monotonic() < give_up_at, log.read_text("utf-8", errors="replace")[-3000:]
        time.sleep(0.5)


@pytest.mark.req("O-8", "V-1")
@pytest.mark.usefixtures("python_with_vllm")
def test_servers_and_stack_are_started_as_the_page_says(tmp_path: Path) -> None:
    install, serve, up = documented_commands()
    assert (ROOT / install).is_file()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "rollstream").symlink_to(ROOT / "rollstream")
    if (ROOT / ".venv-vllm").exists():
        (tmp_path / ".venv-vllm").symlink_to(ROOT / ".venv-vllm")
    make_scenes(tmp_path / "data" / "scenes", num_train=48, num_val=2, seed=6)
    # the page's own port may be taken on this machine
    servers = f"{METHOD}.vllm.server.servers=[{{base_url: 'http://127.0.0.1:{free_port()}'}}]"
    small = (
        f"{METHOD}.max_new_tokens=48",
        "devices.learner_world_size=1",
        "training.effective_batch_size=4",
        "training.per_device_train_batch_size=2",
        # a server's first requests are slow, and the steps before their answers are ground-truth steps
        f"training.max_steps={NUM_STEPS}",
        "stage2_ab.schedule.b_ratio=1",
        "stage2_async.sync_every_steps=2",
        "metrics.base_port=0",
    )
    serving = start(serve, tmp_path, tmp_path / "serve.log", servers, *small)
    try:
        wait_for_text("servers are healthy", tmp_path / "serve.log", serving)
        training = start(up, tmp_path, tmp_path / "up.log", servers, *small)
        try:
            assert training.wait(timeout=400) == 0, (tmp_path / "up.log").read_text("utf-8")[-3000:]
        finally:
            training.kill()
        assert serving.poll() is None
        serving.send_signal(signal.SIGINT)
        assert serving.wait(timeout=60) in (0, 128 + signal.SIGINT)
    finally:
        serving.kill()
        serving.wait()
    rows = list(read_json_lines(RunFolder(tmp_path / "runs" / "stage2-async-vllm-local").train_log))
    assert len(rows) == NUM_STEPS
    assert "B" in {row["kind"] for row in rows}


@pytest.mark.req("O-8")
@pytest.mark.usefixtures("python_with_vllm")
def test_the_bench_measures_both_backends_and_both_ways_of_a_sync(tmp_path: Path) -> None:
    bench = start("rollstream bench rollout --quick --json", ROOT, tmp_path / "bench.log")
    assert bench.wait(timeout=400) == 0, (tmp_path / "bench.log").read_text("utf-8")[-3000:]
    said = (tmp_path / "bench.log").read_text("utf-8")
    found = json.loads(said[said.rindex("\n{\n") :])
    assert {name: list(rates) for name, rates in found["tokens_per_s"].items()} == {
        "hf": ["8"],
        "vllm": ["8"],
    }
    assert all(rate > 0 for rates in found["tokens_per_s"].values() for rate in rates.values())
    (sync,) = found["syncs"]
    assert sync["full_s"] > 0
    assert sync["transfer_s"] > 0
