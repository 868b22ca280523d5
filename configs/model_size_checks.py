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
    yield from _adapters(config)


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


def _adapters(config: RunConfig) -> Iterator[Problem]:
    lora = config.training.lora
    rate: KeyPath = (*TRAINING, "learning_rates", "coordinates")
    if lora.rank is None and config.training.learning_rates.coordinates is not None:
        message = "is for the rows that are trained beside adapters; set training.lora.rank or take it out"
        yield Problem(message=message, paths=(rate, (*TRAINING, "lora", "rank")))
    twice = sorted({target for target in lora.targets if lora.targets.count(target) > 1})
    if twice:
        message = f"names {', '.join(twice)} more than once; keep one"
        yield Problem(message=message, paths=((*TRAINING, "lora", "targets"),))
    if lora.rank is not None and config.rollout_matching.rollout_backend == "vllm" and config.b_ratio > 0:
        yield from _served_adapters(config)


def _served_adapters(config: RunConfig) -> Iterator[Problem]:
    """What a rollout server cannot do with adapters."""
    lora, method = config.training.lora, ("custom", "extra", "rollout_matching")
    rank: KeyPath = (*TRAINING, "lora", "rank")
    if lora.dora:
        message = "got true, but vLLM serves no DoRA adapters; set false, or rollout_backend: hf"
        yield Problem(message=message, paths=((*TRAINING, "lora", "dora"), (*method, "rollout_backend")))
    if config.rollout_matching.vllm.sync.mode == "transfer":
        message = "got transfer, but servers load adapters by their path; set full"
        yield Problem(message=message, paths=((*method, "vllm", "sync", "mode"), rank))
    if config.stage2_async.in_flight_sync == "keep":
        message = "got keep, but a rollout in flight holds on to the adapter that it began with; set strict"
        yield Problem(message=message, paths=(("stage2_async", "in_flight_sync"), rank))
