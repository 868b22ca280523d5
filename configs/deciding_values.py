"""Which values of a configuration decide a run's past, and which may change while it runs [Q-18].

Two runs are the same when everything agrees that decides which rollouts are asked for, what they are trained
on and how; worker numbers, budgets, deadlines and the length of the run may change, and are recorded. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from configs.schema import RunConfig

_METHOD: Final = "custom.extra.rollout_matching"
# a key stands for everything below it
DECIDING_KEYS: Final = (
    "custom.trainer_variant",
    "devices.learner_world_size",
    "run.seed",
    "data.object_ordering",
    "data.augment",
    "data.skip_untrainable",
    "model.config",
    "model.image",
    "model.system_prompt",
    "model.instruction",
    "stage2_ab",
    "stage2_async.sync_every_steps",
    "training.effective_batch_size",
    "training.per_device_train_batch_size",
    "training.global_max_length",
    "training.learning_rate",
    "training.learning_rates",
    "training.min_learning_rate",
    "training.weight_decay",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_epsilon",
    "training.max_grad_norm",
    "training.warmup_steps",
    "training.lr_scheduler",
    "training.precision",
    "training.lora",
    "training.freeze",
    f"{_METHOD}.target_sigma",
    f"{_METHOD}.target_truncate",
    f"{_METHOD}.temperature_coord",
    f"{_METHOD}.soft_ce_weight",
    f"{_METHOD}.w1_weight",
    f"{_METHOD}.duplicate_weight",
    f"{_METHOD}.gate_weight",
)
# where things are and who watches them is no setting of the run
_LEFT_OUT: Final = (
    "run.name",
    "run.output_dir",
    "broker.url",
    "metrics",
    "tracking",
    "data.train_jsonl",
    "model.name_or_path",
)


def split_values(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return (deciding, settings): every value of the configuration under its dotted key, as JSON."""
    values = {
        key: json.dumps(value, sort_keys=True, default=str)
        for key, value in _flat(config.model_dump(mode="json"))
        if not _is_below(key, _LEFT_OUT)
    }
    values["training.precision"] = json.dumps(config.precision)
    deciding = {key: value for key, value in values.items() if _is_below(key, DECIDING_KEYS)}
    ga = config.gradient_accumulation_steps
    deciding["training.gradient_accumulation_steps"] = json.dumps(ga)
    settings = {key: value for key, value in values.items() if key not in deciding}
    return deciding, settings


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _is_below(key: str, above: tuple[str, ...]) -> bool:
    return any(key == item or key.startswith(f"{item}.") for item in above)
