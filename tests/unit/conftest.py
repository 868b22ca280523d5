"""A tiny model folder that the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollstream.models.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen3-VL of the scenes preset, made once; do not write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=3).folder
