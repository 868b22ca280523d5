"""L-6: checkpoints are written while training goes on, and a claim is settled when one is durable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Event

import pytest

from broker_schemas.errors import RunStopped
from learner import milestones
from learner.checkpoints import latest_checkpoint
from learner.checksums import verify_checksums
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import one_rank, run_one, settings_for


@pytest.mark.req("L-6", "L-11")
def test_training_goes_on_while_a_checkpoint_is_written_and_its_claims_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, real_sync = Event(), os.fsync

    def slow_sync(descriptor: int) -> None:
        assert may_write.wait(60)
        real_sync(descriptor)

    def commit(optimizer_step: int) -> None:
        if optimizer_step == 4:
            may_write.set()

    monkeypatch.setattr(os, "fsync", slow_sync)
    monkeypatch.setattr(milestones, "_PATIENCE_WITH_DISK_S", 0.0)
    broker = FakeBroker(1, on_commit=commit)
    settings = settings_for(tmp_path, "run", is_policy_published=False)
    run_one(one_rank(), settings, broker)

    rows = read_json_lines(tmp_path / "run" / "train_log.jsonl")
    assert sum(row["checkpoint_s"] for row in rows) > 0
    assert all(row["tokens_per_s"] > 0 and row["memory/peak_gb_0"] > 0 for row in rows)
    commits = [number for what, number in broker.told if what == "commit"]
    settled = [number for what, number in broker.told if what == "settle"]
    assert commits == [0, 1, 2, 3, 4, 5]
    assert (settled[0], settled[-1]) == (2, 6)
    assert broker.told.index(("settle", 2)) > broker.told.index(("commit", 4)), (
        "settled before it was durable"
    )
    assert not (settings.checkpoints_dir / "checkpoint-4").exists(), "put off until the disk was free"


@pytest.mark.req("L-6")
def test_a_disk_that_refuses_a_checkpoint_in_the_background_ends_the_run_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_one(one_rank(), settings_for(tmp_path, "run", max_steps=2), FakeBroker(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    settings = settings_for(tmp_path, "run", is_policy_published=False)
    broker = FakeBroker(1)
    with pytest.raises(RunStopped, match=r"checkpoint-4: cannot be written \(No space left .*free"):
        run_one(one_rank(), settings, broker)
    assert latest_checkpoint(settings.checkpoints_dir) == settings.checkpoints_dir / "checkpoint-2"
    assert [path.name for path in settings.checkpoints_dir.iterdir()] == ["checkpoint-2"]
    assert ("settle", 4) not in broker.told


@pytest.mark.req("L-6")
def test_what_a_killed_writer_left_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", max_steps=2)
    left_over = settings.checkpoints_dir / ".writing-checkpoint-2-0a1b2c3d"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    run_one(one_rank(), settings, FakeBroker(1))
    assert [path.name for path in settings.checkpoints_dir.iterdir()] == ["checkpoint-2"]
    assert len(read_json_lines(tmp_path / "run" / "train_log.jsonl")) == 2


@pytest.mark.req("L-6")
def test_each_rank_checks_the_contents_of_its_share_of_the_files_alone(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    digests = {name: {"size_bytes": 100, "sha256": "wrong"} for name in ("a", "b", "c")}
    (tmp_path / "checksums.json").write_text(json.dumps(digests))
    named = []
    for rank in range(4):
        try:
            verify_checksums(tmp_path, rank=rank, world_size=4)
        except RunStopped as stop:
            named.append(str(stop).partition(": damaged")[0])
    assert named == [str(tmp_path / name) for name in ("a", "b", "c")]
