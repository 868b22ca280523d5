"""Loads a configuration when a command runs, not when the program starts: ``--help`` needs none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs import RunConfig


def load_run(path: Path, overrides: Sequence[str] | None) -> RunConfig:
    """Return the configuration in ``path`` with its overrides; raises ConfigError."""
    from configs import load_config

    return load_config(path, tuple(overrides or ()))
