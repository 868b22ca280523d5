"""Settings that the rest of the configuration leaves without effect; written out, they are refused [S-6]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from configs.problems import KeyPath, Problem
from configs.rollout_sections import TOP_K_OFF
from configs.schema import AB_VARIANTS, RunConfig

METHOD: KeyPath = ("custom", "extra", "rollout_matching")
VARIANT: KeyPath = ("custom", "trainer_variant")
QUEUE_KEYS = ("queue_limit", "version_window", "sync_every_steps", "prefetch_target_packs", "in_flight_sync")


@dataclass(frozen=True, kw_only=True)
class IgnoredSetting:
    """`prefix` and all keys below have no effect when `why` gives a reason; `depends` decides that."""

    prefix: KeyPath
    depends: KeyPath
    why: Callable[[RunConfig], str | None]


def _unless_async(config: RunConfig) -> str | None:
    if config.variant == "stage2_async":
        return None
    return f"only stage2_async has a queue ahead of time, custom.trainer_variant is {config.variant}"


def _unless_ab(config: RunConfig) -> str | None:
    if config.variant in AB_VARIANTS:
        return None
    return f"{config.variant} has no channel A: every step is a rollout step"


def _unless_rollout_matching(config: RunConfig) -> str | None:
    return f"{config.variant} decides itself how packs are made" if config.variant in AB_VARIANTS else None


def _unless_vllm(config: RunConfig) -> str | None:
    backend = config.rollout_matching.rollout_backend
    return None if backend == "vllm" else f"rollout_backend is {backend}"


def _top_p_when_greedy(config: RunConfig) -> str | None:
    decoding = config.rollout_matching.decoding
    return _greedy(decoding.temperature == 0 and decoding.top_p != 1)


def _top_k_when_greedy(config: RunConfig) -> str | None:
    decoding = config.rollout_matching.decoding
    return _greedy(decoding.temperature == 0 and decoding.top_k != TOP_K_OFF)


def _greedy(is_greedy: bool) -> str | None:
    return "temperature 0 is greedy and samples nothing; raise decoding.temperature" if is_greedy else None


def _without_rollouts(config: RunConfig) -> str | None:
    is_zero = config.stage2_ab.schedule.b_ratio is not None and config.b_ratio == 0
    return "stage2_ab.schedule.b_ratio is 0: no step trains rollouts" if is_zero else None


def _without_dump(config: RunConfig) -> str | None:
    return None if config.rollout_matching.debug_dump_parse_failures else "debug_dump_parse_failures is off"


def _without_tls(config: RunConfig) -> str | None:
    url = config.broker.url
    return (
        None
        if url is not None and url.startswith("rediss://")
        else "broker.url does not begin with rediss://"
    )


def _without_url(config: RunConfig) -> str | None:
    return None if config.broker.url is not None else "without broker.url the embedded Redis is used"


def _without_evaluation(config: RunConfig) -> str | None:
    return None if config.training.eval_every_steps else "training.eval_every_steps is 0"


def _without_metrics(config: RunConfig) -> str | None:
    return None if config.metrics.base_port else "metrics.base_port is 0"


def _without_project(config: RunConfig) -> str | None:
    kinds = config.tracking.to
    return None if "wandb" in kinds or "mlflow" in kinds else "tracking.to names neither wandb nor mlflow"


def _without_decay(config: RunConfig) -> str | None:
    return "lr_scheduler is constant" if config.training.lr_scheduler == "constant" else None


def _without_lora(config: RunConfig) -> str | None:
    return "training.lora.rank is not set" if config.training.lora.rank is None else None


IGNORED_SETTINGS: tuple[IgnoredSetting, ...] = (
    *(IgnoredSetting(prefix=("stage2_async", k), depends=VARIANT, why=_unless_async) for k in QUEUE_KEYS),
    IgnoredSetting(prefix=("stage2_ab",), depends=VARIANT, why=_unless_ab),
    IgnoredSetting(prefix=("data", "augment"), depends=VARIANT, why=_unless_ab),
    IgnoredSetting(
        prefix=(*METHOD, "post_rollout_pack_scope"), depends=VARIANT, why=_unless_rollout_matching
    ),
    IgnoredSetting(prefix=(*METHOD, "vllm"), depends=(*METHOD, "rollout_backend"), why=_unless_vllm),
    IgnoredSetting(
        prefix=(*METHOD, "decoding", "top_p"),
        depends=(*METHOD, "decoding", "temperature"),
        why=_top_p_when_greedy,
    ),
    IgnoredSetting(
        prefix=(*METHOD, "decoding", "top_k"),
        depends=(*METHOD, "decoding", "temperature"),
        why=_top_k_when_greedy,
    ),
    IgnoredSetting(
        prefix=(*METHOD, "debug_dump_max"),
        depends=(*METHOD, "debug_dump_parse_failures"),
        why=_without_dump,
    ),
    IgnoredSetting(
        prefix=(*METHOD, "duplicate_weight"),
        depends=("stage2_ab", "schedule", "b_ratio"),
        why=_without_rollouts,
    ),
    IgnoredSetting(prefix=("broker", "tls"), depends=("broker", "url"), why=_without_tls),
    IgnoredSetting(prefix=("broker", "jobs_url"), depends=("broker", "url"), why=_without_url),
    IgnoredSetting(prefix=("broker", "username_env"), depends=("broker", "url"), why=_without_url),
    IgnoredSetting(prefix=("broker", "password_env"), depends=("broker", "url"), why=_without_url),
    IgnoredSetting(
        prefix=("training", "early_stop"),
        depends=("training", "eval_every_steps"),
        why=_without_evaluation,
    ),
    IgnoredSetting(
        prefix=("evaluation", "in_stack"),
        depends=("training", "eval_every_steps"),
        why=_without_evaluation,
    ),
    IgnoredSetting(
        prefix=("training", "min_learning_rate"), depends=("training", "lr_scheduler"), why=_without_decay
    ),
    *(
        IgnoredSetting(
            prefix=("training", "lora", key), depends=("training", "lora", "rank"), why=_without_lora
        )
        for key in ("alpha", "dropout", "targets", "dora")
    ),
    IgnoredSetting(prefix=("tracking", "project"), depends=("tracking", "to"), why=_without_project),
    IgnoredSetting(prefix=("metrics", "host"), depends=("metrics", "base_port"), why=_without_metrics),
)


def has_no_effect(config: RunConfig, path: KeyPath) -> bool:
    """Whether the key at `path` changes nothing in this configuration."""
    return any(
        path[: len(setting.prefix)] == setting.prefix and setting.why(config) is not None
        for setting in IGNORED_SETTINGS
    )


def refuse_ignored(config: RunConfig, explicit: frozenset[KeyPath]) -> Iterator[Problem]:
    """A problem for every key in `explicit` that would have no effect; defaults never count."""
    for setting in IGNORED_SETTINGS:
        reason = setting.why(config)
        if reason is None:
            continue
        for path in sorted(explicit, key=str):
            if path[: len(setting.prefix)] == setting.prefix:
                message = f"would be ignored: {reason}; take the key out or change that"
                yield Problem(message=message, paths=(path, setting.depends))
