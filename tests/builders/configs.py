"""Builds configuration files that are valid by default, for one test to break in one place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import ConfigError, RunConfig, load_config

PROJECT_ROOT = Path(__file__).resolve().parents[2]
METHOD = "custom.extra.rollout_matching"
VALID: dict[str, Any] = {
    "run": {"name": "test"},
    "data": {"train_jsonl": "train.jsonl", "val_jsonl": "val.jsonl"},
    "model": {"name_or_path": "some/folder"},
    "custom": {"trainer_variant": "stage2_async", "extra": {"rollout_matching": {"max_new_tokens": 96}}},
    "stage2_ab": {"schedule": {"b_ratio": 0.5}},
    "training": {
        "effective_batch_size": 16,
        "per_device_train_batch_size": 4,
        "global_max_length": 1024,
        "max_steps": 48,
    },
    "devices": {"learner_world_size": 2},
}


def make_mapping(variant: str = "stage2_async", **settings: Any) -> dict[str, Any]:
    """A valid configuration of `variant`; `settings` are `section__key=value`, laid over it."""
    mapping = copy.deepcopy(VALID)
    mapping["custom"]["trainer_variant"] = variant
    if variant == "rollout_matching_sft":
        del mapping["stage2_ab"]
    for name, value in settings.items():
        put(mapping, name.replace("__", "."), value)
    return mapping


def put(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in a nested mapping, making the sections on the way."""
    *above, last = dotted.split(".")
    for key in above:
        mapping = mapping.setdefault(key, {})
    mapping[last] = value


def write_file(folder: Path, content: str | dict[str, Any], name: str = "config.yaml") -> Path:
    """Write YAML text, or a mapping as YAML, and return its path."""
    path = folder / name
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def load_mapping(folder: Path, mapping: dict[str, Any], *overrides: str) -> RunConfig:
    """Write the mapping to a file and load that."""
    return load_config(write_file(folder, mapping), overrides)


def refusal(folder: Path, content: str | dict[str, Any], *overrides: str) -> str:
    """The message with which the content is refused; fails when it loads."""
    path = write_file(folder, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
