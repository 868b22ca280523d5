"""Checks of the keys that make room for larger models: precision, sharding, adapters, parts."""

from __future__ import annotations

from collections.abc import Iterator

from configs.problems import KeyPath, Problem
from configs.schema import RunConfig

TRAINING: KeyPath = ("training",)
WORLD_SIZE: KeyPath = ("devices", "learner_world_size")
PARTS = ("vision", "merger", "text")


def check_model_size(config: RunConfig) -> Iterator[Problem]:
    """Problems of these keys with each other and with the ranks."""
    yield from _sharding(config)
    yield from _learning_rates(config)
    yield from _parts(config)
    yield from _not_there_yet(config)


def _sharding(config: RunConfig) -> Iterator[Problem]:
    sharding = config.training.sharding
    if sharding != "none" and config.learner_world_size == 1:
        message = (
            f"got {sharding} with one rank, which has nobody to share with; take the key out or add ranks"
        )
        yield Problem(message=message, paths=((*TRAINING, "sharding"), WORLD_SIZE))
    if config.precision == "float32" and config.model.attention == "flash":
        message = "got flash, but its kernels take bfloat16 and training.precision is float32; set auto"
        yield Problem(message=message, paths=(("model", "attention"), (*TRAINING, "precision")))


def _learning_rates(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.min_learning_rate > training.learning_rate:
        message = f"got {training.min_learning_rate}, above learning_rate {training.learning_rate}; lower it"
        yield Problem(message=message, paths=((*TRAINING, "min_learning_rate"), (*TRAINING, "learning_rate")))


def _parts(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    frozen = training.freeze
    twice = sorted({part for part in frozen if frozen.count(part) > 1})
    if twice:
        yield Problem(
            message=f"names {', '.join(twice)} more than once; keep one", paths=((*TRAINING, "freeze"),)
        )
    if set(frozen) == set(PARTS):
        message = "freezes vision, merger and text, so nothing is left to train; leave one out"
        yield Problem(message=message, paths=((*TRAINING, "freeze"),))
    for part in (*PARTS, "coordinates"):
        owner = "text" if part == "coordinates" and training.lora.rank is None else part
        if getattr(training.learning_rates, part) is not None and owner in frozen:
            message = f"would be ignored: training.freeze names {owner}; take one of the two out"
            yield Problem(message=message, paths=((*TRAINING, "learning_rates", part), (*TRAINING, "freeze")))


def _not_there_yet(config: RunConfig) -> Iterator[Problem]:
    """Keys that this version reads but cannot carry out."""
    training = config.training
    wanted = {
        ("lora",): training.lora.rank is not None,
        ("learning_rates", "coordinates"): training.learning_rates.coordinates is not None,
    }
    for name, is_wanted in wanted.items():
        if is_wanted:
            yield Problem(
                message="is not there yet in this version; take the key out", paths=((*TRAINING, *name),)
            )
