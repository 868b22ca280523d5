"""The schedule of rollout steps, against exact rational arithmetic."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.records.schedule import next_rollout_step, num_rollout_steps
from learner.schedule import InvalidRatio, is_rollout_step


@pytest.mark.req("S-1")
def test_0_29_gives_29_rollout_steps_in_every_100() -> None:
    for start in range(0, 100_000, 100):
        assert sum(is_rollout_step(start + offset, "0.29") for offset in range(100)) == 29


@pytest.mark.req("S-1")
def test_0_7_matches_exact_rational_arithmetic_over_a_million_steps() -> None:
    num_b_steps = 0

    for optimizer_step in range(1_000_000):
        num_b_steps += is_rollout_step(optimizer_step, "0.7")
        assert num_b_steps == (optimizer_step + 1) * 7 // 10

    ratio = Fraction(7, 10)
    for optimizer_step in range(999_000, 1_000_000):
        expected = int((optimizer_step + 1) * ratio) > int(optimizer_step * ratio)
        assert is_rollout_step(optimizer_step, ratio) == expected


@pytest.mark.req("S-1")
def test_a_resume_in_the_middle_changes_nothing() -> None:
    unbroken = [is_rollout_step(optimizer_step, "0.37") for optimizer_step in range(1000)]

    resumed = [is_rollout_step(optimizer_step, Decimal("0.37")) for optimizer_step in range(613, 1000)]

    assert resumed == unbroken[613:]


@pytest.mark.req("S-1")
@given(numerator=st.integers(0, 500), denominator=st.integers(500, 1000), start=st.integers(0, 10**12))
@settings(max_examples=200, deadline=None)
def test_any_stretch_of_steps_holds_its_share_within_one(
    numerator: int, denominator: int, start: int
) -> None:
    ratio = Fraction(numerator, denominator)

    num_b_steps = sum(is_rollout_step(start + offset, ratio) for offset in range(100))

    assert abs(num_b_steps - 100 * ratio) < 1


@pytest.mark.req("S-1")
@pytest.mark.parametrize("ratio", ["0.25", ".25", "2.5e-1", Decimal("0.250"), Fraction(1, 4)])
def test_all_exact_spellings_of_a_ratio_agree(ratio: str | Decimal | Fraction) -> None:
    assert [s for s in range(12) if is_rollout_step(s, ratio)] == [3, 7, 11]


@pytest.mark.req("S-1")
@pytest.mark.parametrize(("ratio", "expected"), [("0", False), ("1", True), (0, False), (1, True)])
def test_the_ends_of_the_range_mean_never_and_always(ratio: str | int, expected: bool) -> None:
    assert {is_rollout_step(optimizer_step, ratio) for optimizer_step in range(50)} == {expected}


@pytest.mark.req("S-1")
@pytest.mark.parametrize("ratio", ["1.01", "-0.1", "half", "", "NaN", "Infinity", Decimal("NaN"), 2])
def test_a_ratio_outside_the_range_or_no_number_is_refused(ratio: str | Decimal | int) -> None:
    with pytest.raises(InvalidRatio, match=r"stage2_ab.schedule.b_ratio: got .*, expected"):
        is_rollout_step(0, ratio)


@pytest.mark.req("S-1")
@pytest.mark.parametrize("ratio", [0.5, True, None])
def test_a_float_is_refused_even_when_an_equal_exact_ratio_was_seen(ratio: object) -> None:
    assert is_rollout_step(1, Decimal("0.5"))
    assert is_rollout_step(1, 1)

    with pytest.raises(InvalidRatio, match="expected a decimal string"):
        is_rollout_step(1, ratio)  # type: ignore[arg-type]


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_step: got -1, expected 0 or more"):
        is_rollout_step(-1, "0.5")


@pytest.mark.req("S-1")
@given(numerator=st.integers(1, 60), denominator=st.integers(60, 90), start=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_counting_and_looking_ahead_agree_with_the_rule_step_by_step(
    numerator: int, denominator: int, start: int
) -> None:
    ratio = Fraction(numerator, denominator)
    steps = range(start, start + 100)

    num_b_steps = num_rollout_steps(start + 100, ratio) - num_rollout_steps(start, ratio)

    assert num_b_steps == sum(is_rollout_step(step, ratio) for step in steps)
    assert next_rollout_step(start, ratio) == next(step for step in steps if is_rollout_step(step, ratio))


def test_a_schedule_without_rollout_steps_has_no_next_one() -> None:
    with pytest.raises(InvalidRatio, match="expected above 0"):
        next_rollout_step(0, "0")
