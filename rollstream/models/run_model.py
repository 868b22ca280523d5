"""The start model of a run whose configuration describes one instead of naming it."""

from __future__ import annotations

from pathlib import Path

from configs import RunConfig
from rollstream.models.tiny_model import PRESETS, TinySizes, make_tiny_model
from rollstream.wiring import access


def make_described_model(config: RunConfig) -> Path | None:
    """Make the tiny model of ``model.config`` in the run folder, once; None where the run names a model."""
    described = config.model.config
    if described is None:
        return None
    folder = access.run_folder(config).model_dir
    if (folder / "config.json").exists():
        return folder
    image, default = config.model.image, PRESETS["scenes"]
    sizes = TinySizes(
        **described.model_dump(),
        min_pixels=image.min_pixels or default.min_pixels,
        max_pixels=image.max_pixels or default.max_pixels,
    )
    make_tiny_model(folder, seed=config.run.seed, sizes=sizes)
    return folder
