"""What the learning bench keeps of a run, and what runs of several seeds say together. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from broker_schemas.method.evaluation_numbers import PREFIX
from rollstream.run_folder import Row

CONFIDENCE: Final = 0.95
KEPT: Final = (
    *("map_50", "map", "f1_class_50", "f1_50", "f1", "label_accuracy"),
    *("gt_objects", "pred_objects", "matched", "fp", "fn", "duplicates"),
)
"""The numbers of an evaluation that are kept of a run, without PREFIX."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One finished run: optimizer steps, B steps among them, tokens trained, seconds in steps, evaluation."""

    num_steps: int
    num_b_steps: int
    num_tokens: int
    train_s: float
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as one map; ``from_json`` reads it back."""
        return {**asdict(self), "numbers": dict(self.numbers)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CellResult:
        """Return what ``to_json`` wrote; raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            num_steps=int(found["num_steps"]),
            num_b_steps=int(found["num_b_steps"]),
            num_tokens=int(found["num_tokens"]),
            train_s=float(found["train_s"]),
            numbers={str(name): float(value) for name, value in found["numbers"].items()},
        )


def cell_result(steps: Sequence[Row], metrics: Mapping[str, float]) -> CellResult:
    """Fold the training log, one row for each optimizer step, and an evaluation of what it led to."""
    return CellResult(
        num_steps=len(steps),
        num_b_steps=sum(row.get("kind") == "B" for row in steps),
        num_tokens=sum(int(row.get("num_tokens", 0)) for row in steps),
        train_s=round(sum(float(row.get("step_s", 0.0)) for row in steps), 1),
        numbers=kept_numbers(metrics),
    )


def kept_numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the KEPT numbers of an evaluation that are there."""
    return {name: float(metrics[f"{PREFIX}{name}"]) for name in KEPT if f"{PREFIX}{name}" in metrics}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over ``num`` seeds and half the width of its confidence interval, None for a single seed."""

    mean: float
    half_width: float | None
    num: int

    @property
    def is_apart_from_zero(self) -> bool:
        """Whether the interval leaves out 0: for a difference, whether it shows anything."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean with Student's interval of CONFIDENCE; None without a value."""
    num = len(values)
    if num == 0:
        return None
    mean = math.fsum(values) / num
    if num == 1:
        return Estimate(mean=mean, half_width=None, num=1)
    from scipy.stats import t

    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, num - 1))
    return Estimate(mean=mean, half_width=quantile * math.sqrt(variance / num), num=num)


def over_seeds(results: Mapping[int, CellResult], name: str) -> Estimate | None:
    """Return a number of an arm over its seeds; ``results`` by seed."""
    return estimate([result.numbers[name] for result in results.values() if name in result.numbers])


def against(
    results: Mapping[int, CellResult], baseline: Mapping[int, CellResult], name: str
) -> Estimate | None:
    """Return by how much an arm's number is above the baseline's, seed for seed: only seeds of both count."""
    shared = [seed for seed in results if seed in baseline]
    pairs = [(results[seed].numbers, baseline[seed].numbers) for seed in shared]
    return estimate([own[name] - other[name] for own, other in pairs if name in own and name in other])
