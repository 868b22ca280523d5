"""L-5, L-6, L-7: a checkpoint or policy of an adapter is the adapter, which says what its base is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from broker_schemas.errors import RunStopped
from broker_schemas.method.adapter_folder import read_adapter
from broker_schemas.method.adapters import BaseModel
from learner.model_parts import AdapterSettings
from learner.sharding import Precision
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import one_rank, run_one, settings_for
from tests.builders.learners import adapter_settings, tiny_model

torch.set_num_threads(1)


def run(folder: Path, name: str, adapter: AdapterSettings | None = None, **changes: Any) -> Path:
    """Train an adapter; return the folder of its run."""
    settings = settings_for(folder, name, adapter=adapter or adapter_settings(), **changes)
    run_one(one_rank(), settings, FakeBroker(1))
    return folder / name


@pytest.mark.req("L-5", "Q-10")
@pytest.mark.parametrize("precision, is_dora", [("float32", True), ("bf16", False)])
def test_a_resumed_adapter_run_is_the_unbroken_one_to_the_bit(
    tmp_path: Path, precision: Precision, is_dora: bool
) -> None:
    adapter = adapter_settings(is_dora=is_dora, dropout=0.1)
    whole = run(tmp_path, "whole", adapter, precision=precision)
    for max_steps in (4, 6):
        cut = run(tmp_path, "cut", adapter, precision=precision, max_steps=max_steps)
    losses = [[row["loss"] for row in read_json_lines(each / "train_log.jsonl")] for each in (whole, cut)]
    assert losses[0] == losses[1]
    for file in ("adapter_model.safetensors", "coordinate_rows.safetensors", "optimizer.safetensors"):
        first, second = (each / "checkpoints" / "checkpoint-6" / file for each in (whole, cut))
        assert first.read_bytes() == second.read_bytes(), file


@pytest.mark.req("L-6", "L-7")
def test_checkpoint_and_policy_hold_the_adapter_alone_and_name_its_base(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", max_steps=2, publication_dtype=torch.bfloat16)
    whole = sum(p.numel() for p in tiny_model().parameters())
    for place, dtype in (("checkpoints/checkpoint-2", torch.float32), ("policy/v1", torch.bfloat16)):
        stored = read_adapter(folder / place)
        assert stored.plan.base == adapter_settings().base
        assert {tensor.dtype for tensor in stored.tensors.values()} == {dtype}
        assert not list((folder / place).glob("model*.safetensors"))
        rows = stored.tensors["model.language_model.embed_tokens.coordinate_rows"].numel()
        assert sum(tensor.numel() for tensor in stored.tensors.values()) - rows < 0.1 * whole
    assert (folder / "checkpoints" / "checkpoint-2" / "tokenizer_config.json").is_file()
    assert {file.name for file in (folder / "policy" / "v1").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "coordinate_rows.safetensors")
    }


@pytest.mark.req("L-6")
def test_an_adapter_of_another_base_or_a_whole_model_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path, "run", max_steps=2)
    other = BaseModel(path="/models/other", fingerprint="fedcba9876543210")
    with pytest.raises(RunStopped, match=r"an adapter of /models/base .* got /models/other"):
        run(tmp_path, "run", adapter_settings(base=other))
    with pytest.raises(RunStopped, match="got an adapter, expected the weights of a whole model"):
        run_one(one_rank(), settings_for(tmp_path, "run"), FakeBroker(1))
    run_one(one_rank(), settings_for(tmp_path, "plain", max_steps=2), FakeBroker(1))
    with pytest.raises(RunStopped, match=r"got no adapter_config\.json, expected an adapter"):
        run(tmp_path, "plain")


@pytest.mark.req("L-6")
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_adapter_is_named(tmp_path: Path, file: str) -> None:
    checkpoint = run(tmp_path, "run", max_steps=2) / "checkpoints" / "checkpoint-2"
    (checkpoint / "checksums.json").unlink()
    (checkpoint / file).write_bytes(b"{")
    with pytest.raises(RunStopped, match=str(checkpoint)):
        run(tmp_path, "run")
