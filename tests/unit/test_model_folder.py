"""Model folders: what loads, and what is refused before a run starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from broker_schemas.errors import DataError
from broker_schemas.method.model_folder import load_policy, resolve_model_dir
from broker_schemas.method.prompt import PromptBuilder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_in_the_dtype_asked_for_with_sdpa(tiny_folder: Path, dtype: str) -> None:
    model = load_policy(tiny_folder, dtype)

    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert model.get_output_embeddings().weight.shape[0] > int(
        PromptBuilder(tiny_folder).coord_vocab.ids.max()
    )


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(tiny_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    (folder / missing).unlink()

    with pytest.raises(DataError, match=f"got no {missing}, expected a Hugging Face folder"):
        load_policy(folder)


def test_a_wrong_path_is_named_with_the_remedy_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model '.*nowhere': got neither a folder.*check the path"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(DataError, match="model 'nobody/nothing': got neither.*hf download nobody/nothing"):
        resolve_model_dir("nobody/nothing")


def test_broken_weights_and_an_unknown_dtype_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")

    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_policy(folder)
    with pytest.raises(DataError, match="model dtype: got 'int8', expected one of float32"):
        load_policy(tiny_folder, "int8")


@pytest.mark.req("M-11")
def test_coordinate_tokens_outside_the_logits_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    moved = next(token for token in content["added_tokens"] if token["content"] == "<|coord_999|>")
    others = [token for token in content["added_tokens"] if token is not moved]
    padding = [{**moved, "content": f"<|more_{number}|>"} for number in range(3)]
    content["added_tokens"] = others + [
        {**token, "id": len(content["model"]["vocab"]) + len(others) + number}
        for number, token in enumerate([*padding, moved])
    ]
    file.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(
        DataError, match=r"has \d+ rows, expected more than .* id \d+.*rollstream model adapt"
    ):
        load_policy(folder)
