"""The demo's data and model, put where a configuration looks for them: first service of the compose file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from configs import RunConfig
from rollstream.datasets.scenes import make_scenes
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.staged_folder import staged_folder

MAKER: Final = "prepare"


def prepare_inputs(config: RunConfig) -> Iterator[str]:
    """Make what is missing, and yield a line about each; what is there stays as it is.

    Raises DataError where the data's folder holds something else.
    """
    train = Path(config.data.train_jsonl)
    if train.exists():
        yield f"data: {train} is there"
    else:
        yield f"data: {make_scenes(train.parent)}"
    if config.model.name_or_path is None:
        return
    model = Path(config.model.name_or_path)
    if (model / "config.json").exists():
        yield f"model: {model} is there"
        return
    with staged_folder(model, MAKER, {"copy_of": SHIPPED_MODEL.name}) as folder:
        for item in SHIPPED_MODEL.iterdir():
            shutil.copy(item, folder / item.name)
    yield f"model: {model}, a copy of the shipped checkpoint"
