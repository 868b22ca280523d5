"""Reads a configuration file with what it extends and the overrides; the one place here that opens files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from broker_schemas.errors import ConfigError
from configs.merging import apply_overrides, read_with_extends
from configs.problems import Problem, ProblemsFound, render
from configs.schema import RunConfig
from configs.validation import validate


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Load one file; raises `ConfigError` with every problem of it, each with its file and line.

    `overrides` are `section.key=value` texts, the value read as YAML, later ones winning. Paths inside
    the configuration stay as written, relative to the working directory, and are not opened here.
    """
    config, problems = read_config(path, overrides)
    if config is None:
        raise ConfigError(render(str(Path(path)), problems))
    return config


def read_config(
    path: str | os.PathLike[str], overrides: Iterable[str] = ()
) -> tuple[RunConfig | None, list[Problem]]:
    """Like `load_config`, but returns the problems; the configuration is None exactly when there are any."""
    try:
        tree = read_with_extends(Path(path))
        apply_overrides(tree, overrides)
    except ProblemsFound as found:
        return None, list(found.problems)
    return validate(tree)
