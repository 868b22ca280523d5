"""L-12: a learner that has no room for its model says so before it reads a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from broker_schemas.errors import ConfigError
from configs import RunConfig
from learner.model_parts import part_of
from rollstream.wiring import room
from tests.builders.configs import load_mapping, make_mapping

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        "model.visual.blocks.0.weight": torch.zeros(100, 10, dtype=torch.bfloat16),
        "model.language_model.layers.0.weight": torch.zeros(300, 10, dtype=torch.bfloat16),
    }
    assert [part_of(name) for name in tensors] == ["vision", "text"]
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"a/exp_avg": torch.zeros(1000)}, tmp_path / "optimizer.safetensors")
    return tmp_path


def config(tmp_path: Path, **settings: object) -> RunConfig:
    return load_mapping(tmp_path, make_mapping(**settings))


@pytest.mark.req("L-12")
def test_bytes_of_a_rank_by_hand(folder: Path, tmp_path: Path) -> None:
    exact = config(tmp_path, training__precision="float32")
    assert room.count_weights(exact, folder) == (4000, 0)
    assert room.kept_bytes(exact, 4000, 0) == 16 * 4000
    assert room.kept_bytes(config(tmp_path, training__precision="bf16"), 4000, 0) == 18 * 4000
    frozen = config(tmp_path, training__precision="bf16", training__freeze=["vision"])
    assert room.count_weights(frozen, folder) == (3000, 1000)
    assert room.kept_bytes(frozen, 3000, 1000) == 18 * 3000 + 2 * 1000
    shared = config(tmp_path, training__sharding="full", training__precision="bf16")
    assert room.kept_bytes(shared, 4000, 0) == 16 * 4000 // 2
    adapters = config(tmp_path, training__lora__rank=8, training__precision="bf16")
    assert room.count_weights(adapters, folder) == (0, 4000)


@pytest.mark.req("L-12")
def test_too_little_memory_is_said_in_one_line_with_what_to_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = config(tmp_path, training__precision="float32")
    monkeypatch.setattr(room, "free_host_bytes", lambda: 2 * 16 * 4000)
    room.check_room(exact, folder, CPU)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 2 * 16 * 4000 - 1)
    with pytest.raises(ConfigError, match=r"need 0\.0 GB, got 0\.0 GB free on this host, for 2 ranks; .*"):
        room.check_room(exact, folder, CPU)


def test_free_memory_is_what_the_container_has_left_with_its_file_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    unbounded = room.free_host_bytes()
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 2500\ninactive_file 1000\nactive_file 500\n")
    assert room.free_host_bytes() == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_host_bytes() == pytest.approx(unbounded, rel=0.5)
