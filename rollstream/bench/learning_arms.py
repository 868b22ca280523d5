"""The arms of the learning bench: what each trains, how its runs are called, how long they are. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from broker_schemas.errors import ConfigError

B_RATIO: Final = "stage2_ab.schedule.b_ratio"
_METHOD: Final = "custom.extra.rollout_matching"
VARIED: Final = {
    "b_ratio": B_RATIO,
    "temperature": f"{_METHOD}.decoding.temperature",
    "version_window": "stage2_async.version_window",
    "gate": f"{_METHOD}.maskiou_gate",
    "duplicate_weight": f"{_METHOD}.duplicate_weight",
    "transport": f"{_METHOD}.ot_cost",
}
"""What may be varied, by the name of its option: the key of the configuration."""
LONGEST_PREFIX: Final = 24


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to go on from the checkpoint. ``name``: in a-z, 0-9 and hyphens; ``title``: as tables show it.

    ``has_equal_tokens``: its steps are as many as bring it to the tokens that A/B trained with its seed.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    has_equal_tokens: bool = False


ALONE: Final = Arm(name="a", title="A", overrides=(f"{B_RATIO}=0",))
MIXED: Final = Arm(name="ab", title="A/B")
EQUAL_TOKENS: Final = Arm(
    name="a-tokens", title="A, tokens of A/B", overrides=ALONE.overrides, has_equal_tokens=True
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: an arm with a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed-{self.seed}"

    def run_name(self, folder_name: str) -> str:
        """Return the name of its run; ``folder_name`` tells it from runs of other benches on one broker."""
        prefix = slug(folder_name)[:LONGEST_PREFIX].rstrip("-")
        return f"{prefix}-{self.name}" if prefix else self.name


def arms_of(varied: Mapping[str, Sequence[str]]) -> tuple[Arm, ...]:
    """Return A alone, A/B, A alone with the tokens of A/B, then A/B with one setting changed at a time.

    ``varied``: values by the names of VARIED. Raises ConfigError for a value given twice.
    """
    changed = [_changed(name, value) for name, values in varied.items() for value in values]
    names = [arm.name for arm in changed]
    twice = sorted({arm.title for arm in changed if names.count(arm.name) > 1})
    if twice:
        raise ConfigError(f"bench learning: got {', '.join(twice)} more than once, expected each value once")
    return (ALONE, MIXED, EQUAL_TOKENS, *changed)


def _changed(name: str, value: str) -> Arm:
    title = f"{MIXED.title} {name} {value}"
    return Arm(name=slug(f"{MIXED.name} {name} {value}"), title=title, overrides=(f"{VARIED[name]}={value}",))


def cells_of(arms: Sequence[Arm], first_seed: int, num_seeds: int) -> tuple[Cell, ...]:
    """Return every arm with every seed, seed by seed, so that an early stop leaves whole comparisons."""
    seeds = range(first_seed, first_seed + num_seeds)
    return tuple(Cell(arm=arm, seed=seed) for seed in seeds for arm in arms)


def steps_for_tokens(num_steps: int, num_tokens: int, wanted_tokens: int) -> int:
    """Return how many steps train ``wanted_tokens`` where ``num_steps`` trained ``num_tokens``, at least 1.

    Raises ValueError where nothing was trained.
    """
    if num_steps < 1 or num_tokens < 1:
        raise ValueError(f"equal tokens: got {num_tokens} tokens in {num_steps} steps, expected some")
    return max(1, round(num_steps * wanted_tokens / num_tokens))


def slug(text: str) -> str:
    """Return ``text`` in a-z, 0-9 and inner hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
