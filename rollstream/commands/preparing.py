"""What a run's containers begin with: inputs looked for, the demo's own made; first service of compose."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.model_folder import resolve_model_dir
from configs import RunConfig
from rollstream.datasets.scenes import make_scenes
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.staged_folder import staged_folder

MAKER: Final = "prepare"
# what configs/demo.yaml and configs/compose.yaml name: these alone are made, anything else is the user's own
DEMO_DATA: Final = (Path("data/scenes/train.jsonl"), Path("data/scenes/val.jsonl"))
DEMO_MODEL: Final = Path("models/scenes_tiny")
DEFAULT_PASSWORD: Final = "rollstream"
PASSWORDS: Final = ("REDIS_PASSWORD", "GRAFANA_PASSWORD")


def prepare_inputs(config: RunConfig) -> Iterator[str]:
    """Look for data and model, make the demo's own where they are missing, and yield a line about each.

    What is there stays as it is. Raises DataError for inputs of one's own that are not there or may not be
    read, since nothing is drawn into a folder, or copied under the name, of something else; and where the
    run may not be written.
    """
    wanted = (("data.train_jsonl", config.data.train_jsonl), ("data.val_jsonl", config.data.val_jsonl))
    paths = [(key, Path(path)) for key, path in wanted if path is not None]
    for key, path in paths:
        if path not in DEMO_DATA and not path.is_file():
            raise DataError(_missing(key, path, "DATA_DIR"))
    model = config.model.name_or_path
    if model is not None and Path(model) != DEMO_MODEL:
        _check_model(model)
    _check_runs(Path(config.run.output_dir) / config.run.name)
    yield from (f"data: {path} is there" for _, path in paths if path.is_file())
    if any(not path.is_file() for _, path in paths):
        yield f"data: {make_scenes(DEMO_DATA[0].parent)}"
    if model is not None:
        yield from _prepare_model(Path(model))


def _prepare_model(model: Path) -> Iterator[str]:
    if model != DEMO_MODEL or (model / "config.json").exists():
        yield f"model: {model} is there"
        return
    with staged_folder(model, MAKER, {"copy_of": SHIPPED_MODEL.name}) as folder:
        for item in SHIPPED_MODEL.iterdir():
            shutil.copy(item, folder / item.name)
    yield f"model: {model}, a copy of the shipped checkpoint"


def _check_model(name: str) -> None:
    try:
        folder = resolve_model_dir(name)
    except DataError as exc:
        raise DataError(
            f"model.name_or_path: {exc}; in containers, mount the folder that holds it (MODELS_DIR=./models) "
            "or the Hugging Face cache (HUB_CACHE)"
        ) from exc
    closed = [path for path in sorted(folder.iterdir()) if not os.access(path, os.R_OK)]
    if closed:
        raise DataError(
            f"model.name_or_path: user {os.getuid()} may not read {closed[0]}; in containers set RUN_USER to "
            "the owner of the files, or let everybody read them (chmod -R a+rX)"
        )


def _check_runs(folder: Path) -> None:
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(
            f"run.output_dir: user {os.getuid()} may not write into {place}, where the run would lie; in "
            "containers set RUN_USER to the owner of RUNS_DIR, or give the folder to that user"
        )


def _missing(key: str, path: Path, variable: str) -> str:
    return (
        f"{key}: no file {path}; correct the path, make the data with 'rollstream data import', or in "
        f"containers mount the folder that holds it ({variable}=./{path.parts[0]})"
    )


def default_passwords(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that still hold the password that everybody can read in the compose file."""
    return [name for name in PASSWORDS if environment.get(name) == DEFAULT_PASSWORD]
