"""The whole stack on two real servers: a sync at every step, one server killed, sums that balance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.rollout_servers.weight_label import WeightLabel, parse_label
from producers.hf_backend import HfBackend
from rollstream.datasets.scenes import make_scenes
from rollstream.run_folder import RunFolder, read_json_lines
from tests.vllm.conftest import PIXELS, MakeBackend, RunningServers, Stage

ROOT = Path(__file__).parents[2]
# more than the time that a server takes to start again needs; the test stops the run when it has seen enough
MAX_STEPS = 2000
NUM_B_STEPS = 10
VERSION_WINDOW = 8


def write_config(stage: Stage, servers: RunningServers, folder: Path, way: str) -> Path:
    """Two ranks, one pack a rank and step, a sync at every step, strict."""
    make_scenes(folder / "scenes", num_train=48, num_val=2, seed=6)
    config = {
        "run": {"name": "on-vllm", "output_dir": str(folder / "runs"), "seed": 3},
        "data": {"train_jsonl": str(folder / "scenes" / "train.jsonl")},
        "model": {
            "name_or_path": str(stage.model),
            "image": {"min_pixels": PIXELS, "max_pixels": PIXELS},
        },
        "custom": {
            "trainer_variant": "stage2_async",
            "extra": {
                "rollout_matching": {
                    "rollout_backend": "vllm",
                    "decode_batch_size": 4,
                    "max_new_tokens": 24,
                    "vllm": {
                        "server": {"servers": [{"base_url": plan.base_url} for plan in servers.plans]},
                        "sync": {"mode": way},
                    },
                }
            },
        },
        "stage2_ab": {"schedule": {"b_ratio": 0.75}},
        "stage2_async": {
            "queue_limit": 8,
            "version_window": VERSION_WINDOW,
            "prefetch_target_packs": 2,
            "stall_timeout_s": 300,
        },
        "training": {
            "effective_batch_size": 4,
            "per_device_train_batch_size": 2,
            "global_max_length": 512,
            "max_steps": MAX_STEPS,
            "save_every_steps": 8,
        },
        "devices": {"learner_world_size": 2},
        "producers": {"request_size": 4},
        "metrics": {"base_port": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    return list(read_json_lines(folder.train_log))


def wait_for_b_steps(folder: RunFolder, num_wanted: int, stack: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + 600
    while sum(row["kind"] == "B" for row in rows_of(folder)) < num_wanted:
        assert stack.poll() is None, f"the stack ended with {stack.returncode}"
        assert time.monotonic() < give_up_at, (
            f"no {num_wanted} B steps in ten minutes: {rows_of(folder)[-1:]}"
        )
        time.sleep(0.5)


@pytest.mark.req("V-1", "V-2", "V-6", "Q-14")
@pytest.mark.parametrize("way", ["full", "transfer"])
def test_a_run_on_two_servers_goes_on_when_one_is_killed_and_comes_back(
    stage: Stage,
    two_servers: RunningServers,
    make_vllm: MakeBackend,
    make_hf: Callable[[], HfBackend],
    tmp_path: Path,
    way: str,
) -> None:
    config = write_config(stage, two_servers, tmp_path, way)
    folder = RunFolder(tmp_path / "runs" / "on-vllm")
    warm_up(stage, two_servers, make_vllm)
    log = (tmp_path / "up.log").open("wb")
    stack = subprocess.Popen(
        [sys.executable, "-m", "rollstream.commands.program", "up", str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )
    try:
        wait_for_b_steps(folder, 3, stack)
        two_servers.processes[1].kill()
        two_servers.restart(1)
        num_before = sum(row["kind"] == "B" for row in rows_of(folder))
        wait_for_b_steps(folder, max(NUM_B_STEPS, num_before + 3), stack)
        stack.terminate()
        status = stack.wait(timeout=120)
        assert status in (0, 130, 143), f"{status}: " + (tmp_path / "up.log").read_text()[-3000:]
    finally:
        if stack.poll() is None:
            stack.terminate()
            stack.wait(timeout=60)
        log.close()

    rows = rows_of(folder)
    b_rows = [row for row in rows if row["kind"] == "B"]
    assert len(b_rows) >= NUM_B_STEPS
    assert [row["policy_version"] for row in rows] == list(range(len(rows)))
    assert all(row["lag_claimed_max"] <= VERSION_WINDOW for row in b_rows)
    audit = subprocess.run(
        [sys.executable, "-m", "rollstream.commands.program", "audit", str(folder.path), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert audit.returncode == 0, audit.stdout[-2000:]
    assert json.loads(audit.stdout)
    expect_servers_to_generate_as_published(stage, two_servers, make_vllm, make_hf(), folder, len(rows))


def warm_up(stage: Stage, servers: RunningServers, make_vllm: MakeBackend) -> None:
    """A server's first request is slow, and demand would take it for the pace of all."""
    for door in servers.doors():
        backend = make_vllm(doors=[door])
        backend.follow(stage.publish(1, "warm-up"))
        backend.generate(stage.samples[:4], [0] * 4)


def expect_servers_to_generate_as_published(
    stage: Stage,
    servers: RunningServers,
    make_vllm: MakeBackend,
    hf: HfBackend,
    folder: RunFolder,
    policy_version: int,
) -> None:
    """The last sync put the last policy on both servers; greedy, they say what transformers says."""
    path = str(folder.policy_version_dir(policy_version))
    label = WeightLabel(policy_version=policy_version, weights_path=path)
    policy = PublishedPolicy(
        policy_version=policy_version, optimizer_step=policy_version, weights_path=path, published_at_ms=0
    )
    hf.follow(policy)
    expected = [item.response_token_ids.tolist() for item in hf.generate(stage.samples[:4], [0] * 4)]
    for door in servers.doors():
        assert parse_label(door.label()) == label
        backend = make_vllm(doors=[door])
        backend.follow(policy)
        got = backend.generate(stage.samples[:4], [0] * 4)
        assert [item.response_token_ids.tolist() for item in got] == expected
        assert {item.policy_version for item in got} == {policy_version}
