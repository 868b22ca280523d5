"""Keys that rollstream no longer reads, each with what to write instead [S-5]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.problems import KeyPath, Problem
from configs.schema import AB_VARIANTS
from configs.schema_walk import find_key

METHOD = "custom.extra.rollout_matching"
CHANNEL_B = "stage2_ab.channel_b"
DECODE_BATCH_SIZE = f"{METHOD}.decode_batch_size"


@dataclass(frozen=True, kw_only=True)
class RemovedKey:
    """A removed key with its replacement; `subtree` takes in everything below it.

    `variants` narrows it to some trainer variants, empty = all; `successor` is a section whose keys
    have the old names.
    """

    name: str
    say: str
    subtree: bool = False
    variants: tuple[str, ...] = ()
    successor: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """The key as a path."""
        return tuple(self.name.split("."))


def _decode_batch_size(name: str) -> RemovedKey:
    return RemovedKey(name=name, say=f"use {DECODE_BATCH_SIZE}")


def _decoding(name: str) -> RemovedKey:
    return RemovedKey(name=f"{METHOD}.{name}", say=f"use {METHOD}.decoding.{name}")


CHOOSE_ASYNC = "choose custom.trainer_variant: stage2_async; the queue's keys are stage2_async.*"
REMOVED_KEYS: tuple[RemovedKey, ...] = (
    RemovedKey(name=f"{CHANNEL_B}.mode", say=CHOOSE_ASYNC),
    RemovedKey(name=f"{CHANNEL_B}.async", say=CHOOSE_ASYNC, subtree=True, successor="stage2_async"),
    RemovedKey(name=f"{CHANNEL_B}.rollouts_per_step", say="use training.effective_batch_size"),
    RemovedKey(name=f"{CHANNEL_B}.enable_pipeline", say="take it out; overlap is automatic"),
    _decode_batch_size(f"{CHANNEL_B}.rollout_decode_batch_size"),
    _decode_batch_size(f"{CHANNEL_B}.rollout_infer_batch_size"),
    _decode_batch_size(f"{METHOD}.rollout_generate_batch_size"),
    _decode_batch_size(f"{METHOD}.rollout_infer_batch_size"),
    _decoding("temperature"),
    _decoding("top_p"),
    _decoding("top_k"),
    RemovedKey(
        name=f"{METHOD}.rollout_buffer",
        say="take it out; every rollout is trained at most once",
        subtree=True,
    ),
    RemovedKey(
        name=f"{METHOD}.post_rollout_pack_scope",
        say="take it out; under this trainer variant the variant decides how packs are made",
        variants=AB_VARIANTS,
    ),
    RemovedKey(name="stage2_ab.schedule.pattern", say="use stage2_ab.schedule.b_ratio"),
    RemovedKey(name="training.packing_length", say="use training.global_max_length"),
    RemovedKey(name="training.eval_num_samples", say="use evaluation.num_samples"),
)


def take_removed_keys(mapping: dict[str, Any]) -> list[Problem]:
    """Take every removed key out of `mapping`, in place, and tell of each with its replacement.

    Sections that this leaves empty go as well, so that nothing is told twice.
    """
    variant = _at(mapping, ("custom", "trainer_variant"))
    problems: list[Problem] = []
    for removed in REMOVED_KEYS:
        if removed.variants and variant not in removed.variants:
            continue
        *above, name = removed.path
        parent = _at(mapping, tuple(above))
        if not isinstance(parent, dict) or name not in parent:
            continue
        value = parent.pop(name)
        problems.extend(_tell(removed, removed.path, value))
        _drop_empty(mapping, tuple(above))
    return problems


def _tell(removed: RemovedKey, path: KeyPath, value: Any) -> Iterator[Problem]:
    if removed.subtree and isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _tell(removed, (*path, key), inner)
        return
    say = removed.say
    same = (removed.successor, str(path[-1]))
    if removed.successor and find_key(same) is not None:
        say += f", here {'.'.join(same)}"
    yield Problem(message=f"this key is removed; {say}", paths=(path,))


def _at(mapping: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = mapping
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _drop_empty(mapping: dict[str, Any], path: tuple[str, ...]) -> None:
    while path and _at(mapping, path) == {}:
        parent = _at(mapping, path[:-1])
        del parent[path[-1]]
        path = path[:-1]
