"""Which tokenizer and processor an evaluated folder is asked with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import load_config
from rollstream.evaluation import evaluating
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.configs import make_mapping, write_file


@pytest.fixture
def asked_with(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Evaluation is another test's matter: note whose companions it was to use."""
    seen: list[Path | None] = []

    class Noted:
        def __init__(self, _config: Any, *, companions: Path | None, **_: Any) -> None:
            seen.append(companions)

        def evaluate_folder(self, *_: Any, **__: Any) -> None:
            return None

    monkeypatch.setattr(evaluating, "Evaluator", Noted)
    return seen


def test_a_whole_folder_is_asked_with_its_own_tokenizer(
    tmp_path: Path, asked_with: list[Path | None]
) -> None:
    whole, weights_alone = tmp_path / "whole", tmp_path / "weights"
    shutil.copytree(SHIPPED_MODEL, whole)
    shutil.copytree(SHIPPED_MODEL, weights_alone, ignore=shutil.ignore_patterns("tokenizer*"))
    mapping = make_mapping(model__name_or_path=str(SHIPPED_MODEL), run__output_dir=str(tmp_path / "runs"))
    config = load_config(write_file(tmp_path, mapping, "run.yaml"))

    for model in (whole, weights_alone, None):
        evaluating.evaluate_run(config, model=model, label=None, num_samples=1)

    assert asked_with == [whole, None, None]
