"""L-6: `model export` writes an ordinary folder: a model, a merged adapter, or base and adapter apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.model_folder import load_policy
from broker_schemas.method.weight_files import stored_tensors
from rollstream.commands.program import app
from rollstream.models.exporting import export_model
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.learner_runs import companions_of
from tests.builders.trained_adapters import logits_of, write_trained

torch.set_num_threads(1)


def make_run(folder: Path) -> Path:
    """Write a run of one adapter's checkpoint, with image bounds of its own."""
    checkpoint = folder / "checkpoints" / "checkpoint-3"
    write_trained(checkpoint, SHIPPED_MODEL, seed=3)
    companions_of(SHIPPED_MODEL).copy_to(checkpoint)
    image = "image: {min_pixels: 4096, max_pixels: 16384}"
    (folder / "resolved.yaml").write_text(f"model: {{name_or_path: '{SHIPPED_MODEL}', {image}}}\n")
    return folder


@pytest.mark.req("L-6", "L-7")
def test_a_merged_adapter_is_an_ordinary_folder_that_computes_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    expected = logits_of(load_policy(run / "checkpoints" / "checkpoint-3"))
    done = CliRunner().invoke(app, ["model", "export", str(run), str(tmp_path / "out"), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "merged adapter" in done.output
    merged = load_policy(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)
    assert set(stored_tensors(tmp_path / "out")) == set(stored_tensors(SHIPPED_MODEL))
    assert not {"trainer_state.json", "adapter_config.json"} & {
        path.name for path in (tmp_path / "out").iterdir()
    }
    size = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 4096, "longest_edge": 16384}
    ours = ImageProcessor(SHIPPED_MODEL, tmp_path, min_pixels=4096, max_pixels=16384)
    assert ImageProcessor(tmp_path / "out", tmp_path).fingerprint == ours.fingerprint


@pytest.mark.req("L-6")
def test_base_and_adapter_apart_make_the_same_model_by_peft(tmp_path: Path) -> None:
    import peft

    run = make_run(tmp_path / "run")
    expected = logits_of(load_policy(run / "checkpoints" / "checkpoint-3"))
    export_model(run, tmp_path / "out", is_apart=True, dtype="float32")
    model = peft.PeftModel.from_pretrained(load_policy(tmp_path / "out"), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.req("L-6")
def test_an_export_is_in_bfloat16_and_a_second_one_takes_its_place(tmp_path: Path) -> None:
    export_model(SHIPPED_MODEL, tmp_path / "out", dtype="float32")
    export_model(SHIPPED_MODEL, tmp_path / "out")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "out").values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.req("L-6")
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match="no checkpoint of step 7, expected one of: 3"):
        export_model(run, tmp_path / "out", step=7)
    with pytest.raises(DataError, match="no such folder"):
        export_model(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="got --apart for a whole model"):
        export_model(SHIPPED_MODEL, tmp_path / "out", is_apart=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="did not make"):
        export_model(run, tmp_path / "mine")
    assert not (tmp_path / "out").exists()
