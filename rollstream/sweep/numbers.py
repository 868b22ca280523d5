"""What a sweep keeps of one cell: the numbers of O-7, folded from the files of its run. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from rollstream.run_folder import Row
from rollstream.show.report.counting import count, counts, key_numbers, number

SPREAD_NUMBERS: Final = (
    "idle_share", "mean_depth", "lag_mean", "rollouts_per_s",
    "tokens_per_s", "steps_per_s", "realised_b_ratio",
)  # fmt: skip
_NUM_PARTS: Final = 5
_FEWEST_STEPS: Final = 10


@dataclass(frozen=True, kw_only=True)
class CellNumbers:
    """The numbers of one finished cell; None where its run did not write them.

    Depth and rates are those of the time in which the learner made steps: neither starting up nor stopping
    counts. ``num_skipped`` is b_step_skipped_due_to_queue; ``lag_mean`` weighs every claimed segment alike.
    ``spreads`` says how far a number is known: the standard error of its mean over the fifths of the run, by
    name of the number; empty for a run of under ten steps.
    """

    num_steps: int = 0
    num_b_steps: int = 0
    num_skipped: int = 0
    idle_share: float | None = None
    mean_depths: tuple[float, ...] = ()
    lag_mean: float | None = None
    lag_max: int | None = None
    drops: Mapping[str, int] = field(default_factory=dict)
    rejects: Mapping[str, int] = field(default_factory=dict)
    rollouts_per_s: float | None = None
    tokens_per_s: float | None = None
    steps_per_s: float | None = None
    f1: float | None = None
    balanced: bool | None = None
    spreads: Mapping[str, float] = field(default_factory=dict)

    @property
    def realised_b_ratio(self) -> float | None:
        return self.num_b_steps / self.num_steps if self.num_steps else None

    @property
    def mean_depth(self) -> float | None:
        """Ready packs of a rank, the mean over ranks."""
        return sum(self.mean_depths) / len(self.mean_depths) if self.mean_depths else None

    @property
    def num_dropped(self) -> int:
        return sum(self.drops.values())

    def to_json(self) -> dict[str, Any]:
        """Return the numbers with those that follow from them; `from_json` reads it back."""
        own = dataclasses.asdict(self)
        return {**own, "mean_depths": list(self.mean_depths), "realised_b_ratio": self.realised_b_ratio}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> CellNumbers:
        """Return the numbers that `to_json` wrote; what is missing or no number stays unknown."""
        depths = row.get("mean_depths")
        balanced = row.get("balanced")
        return cls(
            num_steps=count(row, "num_steps") or 0,
            num_b_steps=count(row, "num_b_steps") or 0,
            num_skipped=count(row, "num_skipped") or 0,
            idle_share=number(row, "idle_share"),
            mean_depths=tuple(float(depth) for depth in depths) if isinstance(depths, list) else (),
            lag_mean=number(row, "lag_mean"),
            lag_max=count(row, "lag_max"),
            drops=counts(row, "drops"),
            rejects=counts(row, "rejects"),
            rollouts_per_s=number(row, "rollouts_per_s"),
            tokens_per_s=number(row, "tokens_per_s"),
            steps_per_s=number(row, "steps_per_s"),
            f1=number(row, "f1"),
            balanced=balanced if isinstance(balanced, bool) else None,
            spreads=_numbers_by_name(row.get("spreads")),
        )


def cell_numbers(
    steps: Sequence[Row], samples: Sequence[Row], audit: Mapping[str, Any], *, f1: float | None
) -> CellNumbers:
    """Fold one run: ``steps`` one row for each optimizer step, ``samples`` in time order, the audit's map.

    All may be empty: what they would say is unknown then.
    """
    return replace(_fold(steps, samples, audit, f1), spreads=_spreads(steps, samples))


def _numbers_by_name(value: object) -> dict[str, float]:
    found = value if isinstance(value, dict) else {}
    return {str(name): float(item) for name, item in found.items() if isinstance(item, int | float)}


def _spreads(steps: Sequence[Row], samples: Sequence[Row]) -> dict[str, float]:
    """Return the standard error of each number's mean over the fifths of the run that know it."""
    if len(steps) < _FEWEST_STEPS:
        return {}
    ends = [len(steps) * part // _NUM_PARTS for part in range(_NUM_PARTS + 1)]
    parts = [_fold(steps[start:end], samples, {}, None) for start, end in pairwise(ends)]
    found: dict[str, float] = {}
    for name in SPREAD_NUMBERS:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        if len(values) > 1:
            found[name] = statistics.stdev(values) / len(values) ** 0.5
    return found


def _fold(
    steps: Sequence[Row], samples: Sequence[Row], audit: Mapping[str, Any], f1: float | None
) -> CellNumbers:
    inside = _while_training(steps, samples)
    known = key_numbers(steps, inside, b_ratio=None)
    lag_mean, lag_max = _lag([row for row in steps if row.get("kind") == "B"])
    balanced = audit.get("balanced")
    return CellNumbers(
        num_steps=known.num_steps,
        num_b_steps=known.num_b_steps,
        num_skipped=known.skips.get("queue_short", 0),
        idle_share=known.idle_share,
        mean_depths=_mean_depths(inside),
        lag_mean=lag_mean,
        lag_max=lag_max,
        drops=counts(audit, "dropped"),
        rejects=counts(audit, "rejected"),
        rollouts_per_s=known.rollouts_per_s,
        tokens_per_s=known.tokens_per_s,
        steps_per_s=known.steps_per_s,
        f1=f1,
        balanced=balanced if isinstance(balanced, bool) else None,
    )


def _while_training(steps: Sequence[Row], samples: Sequence[Row]) -> list[Row]:
    """Return the samples from the start of the first step to the end of the last one."""
    ends = [(time_ms, number(row, "step_s") or 0.0) for row in steps if (time_ms := number(row, "time_ms"))]
    if not ends:
        return []
    start_ms, end_ms = min(end - 1000 * step_s for end, step_s in ends), max(end for end, _ in ends)
    return [row for row in samples if start_ms <= (number(row, "time_ms") or 0.0) <= end_ms]


def _mean_depths(samples: Sequence[Row]) -> tuple[float, ...]:
    """Return each rank's mean depth over the samples that show as many ranks as the last one."""
    shown = [row["ready_depth"] for row in samples if isinstance(row.get("ready_depth"), list)]
    if not shown:
        return ()
    whole = [depths for depths in shown if len(depths) == len(shown[-1])]
    return tuple(sum(float(depths[rank]) for depths in whole) / len(whole) for rank in range(len(whole[-1])))


def _lag(b_steps: Sequence[Row]) -> tuple[float | None, int | None]:
    """Return mean and highest lag when claimed; None without a B step."""
    known = [
        (lag, number(row, "num_segments") or 0.0)
        for row in b_steps
        if (lag := number(row, "lag_claimed_mean")) is not None
    ]
    weight = sum(segments for _, segments in known)
    highest = [lag for row in b_steps if (lag := count(row, "lag_claimed_max")) is not None]
    mean = sum(lag * segments for lag, segments in known) / weight if weight else None
    return mean, max(highest, default=None)
