"""The one rule of the schedule [S-1]; it depends on the step alone, so a resume changes nothing."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache

ExactRatio = str | Decimal | Fraction | int


class InvalidRatio(ValueError):
    """A `b_ratio` that is no exact number in [0, 1]."""


def is_rollout_step(optimizer_step: int, b_ratio: ExactRatio) -> bool:
    """Return whether step s, `optimizer_step` from 0, is a B step: floor((s + 1) r) > floor(s r), exactly.

    `b_ratio` is r in [0, 1] as a decimal string, `Decimal`, `Fraction` or whole number; a float is refused,
    because 0.29 as a float is not 29/100 and the schedule would drift. Among any 1/r steps in a row the B
    steps are spread as evenly as can be; of the first n steps exactly floor(n r) are B. Raises
    `InvalidRatio`, and `ValueError` for a negative step.
    """
    if optimizer_step < 0:
        raise ValueError(f"optimizer_step: got {optimizer_step}, expected 0 or more")
    numerator, denominator = _exact_ratio(b_ratio)
    return (optimizer_step + 1) * numerator // denominator > optimizer_step * numerator // denominator


def num_rollout_steps(num_steps: int, b_ratio: ExactRatio) -> int:
    """Return how many of the first `num_steps` optimizer steps (0 or more) are B steps: floor(n r)."""
    numerator, denominator = _exact_ratio(b_ratio)
    return num_steps * numerator // denominator


def next_rollout_step(optimizer_step: int, b_ratio: ExactRatio) -> int:
    """Return the first B step from `optimizer_step` on; `b_ratio` is above 0.

    Step t is the k-th B step iff floor((t + 1) r) = k > floor(t r), that is t = ceil(k / r) - 1. Raises
    `InvalidRatio` for a ratio of 0, where there is none.
    """
    numerator, denominator = _exact_ratio(b_ratio)
    if numerator == 0:
        raise InvalidRatio(f"stage2_ab.schedule.b_ratio: got {b_ratio!r}, expected above 0: it has no B step")
    return -(-(num_rollout_steps(optimizer_step, b_ratio) + 1) * denominator // numerator) - 1


def _exact_ratio(b_ratio: ExactRatio) -> tuple[int, int]:
    # a Fraction is hashed by a division: asking the cache would cost more than looking
    if type(b_ratio) is Fraction and 0 <= b_ratio.numerator <= b_ratio.denominator:
        return b_ratio.numerator, b_ratio.denominator
    return _read_ratio(b_ratio)


# typed: 0.5 and Decimal("0.5") are equal and hash alike, and the float must not find the other's entry
@lru_cache(maxsize=64, typed=True)
def _read_ratio(b_ratio: ExactRatio) -> tuple[int, int]:
    if not isinstance(b_ratio, str | Decimal | Fraction | int) or isinstance(b_ratio, bool):
        raise InvalidRatio(
            f"stage2_ab.schedule.b_ratio: got {b_ratio!r} ({type(b_ratio).__name__}), expected a decimal "
            "string such as '0.29', a Decimal or a Fraction; a float is not exact"
        )
    try:
        ratio = Fraction(Decimal(b_ratio)) if isinstance(b_ratio, str) else Fraction(b_ratio)
    except (InvalidOperation, ValueError, OverflowError) as exc:
        raise InvalidRatio(
            f"stage2_ab.schedule.b_ratio: got {b_ratio!r}, expected a decimal number from 0 to 1"
        ) from exc
    if not 0 <= ratio <= 1:
        raise InvalidRatio(f"stage2_ab.schedule.b_ratio: got {b_ratio!r}, expected a value from 0 to 1")
    return ratio.numerator, ratio.denominator
