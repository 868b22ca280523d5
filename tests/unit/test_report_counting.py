"""The key numbers of a report, from rows of the training log and of the stack's samples."""

from __future__ import annotations

import pytest

from rollstream.show.report.counting import (
    counts,
    is_skip,
    key_numbers,
    number,
    rate_per_s,
)
from tests.builders.run_folders import START_MS, make_sample, make_step


def test_realised_and_scheduled_b_steps_and_skips_are_counted_by_hand() -> None:
    a_step = {"kind": "A", "reason": "schedule"}
    steps = [
        make_step(0, **a_step),
        make_step(1, kind="A", reason="queue_short"),
        make_step(2, **a_step),
        make_step(3),
        make_step(4, **a_step),
    ]

    numbers = key_numbers(steps, [], b_ratio="0.5")

    assert (numbers.num_steps, numbers.num_b_steps, numbers.num_scheduled_b_steps) == (5, 1, 2)
    assert numbers.realised_b_ratio == 0.2
    assert numbers.skips == {"queue_short": 1}


@pytest.mark.parametrize(
    "ratio,num_steps,expected", [("0", 10, 0), ("1", 10, 10), ("0.29", 100, 29), ("0.1", 9, 0)]
)
def test_the_schedule_reads_its_ratio_as_an_exact_decimal(ratio: str, num_steps: int, expected: int) -> None:
    steps = [make_step(optimizer_step) for optimizer_step in range(num_steps)]
    assert key_numbers(steps, [], b_ratio=ratio).num_scheduled_b_steps == expected


def test_idle_share_and_token_rate_come_from_the_logged_seconds() -> None:
    steps = [
        make_step(0, wait_s=1.0, busy_s=3.0, step_s=4.0, num_tokens=400),
        make_step(1, wait_s=0.0, busy_s=4.0, step_s=4.0, num_tokens=800),
        make_step(2, wait_s=None, busy_s=None, step_s=None, num_tokens=5000),
    ]

    numbers = key_numbers(steps, [], b_ratio=None)

    assert numbers.idle_share == 1 / 8
    assert numbers.tokens_per_s == 150
    assert numbers.num_scheduled_b_steps is None


def test_the_rollout_rate_leaves_out_pauses_and_a_count_that_began_anew() -> None:
    samples = [
        make_sample(0, pushed=0),
        make_sample(10, pushed=20),
        make_sample(4000, pushed=25),
        make_sample(4010, pushed=5),
        make_sample(4020, pushed=45),
    ]

    assert rate_per_s(samples, "pushed") == (20 + 40) / 20
    assert rate_per_s(samples[:1], "pushed") is None
    assert rate_per_s([], "pushed") is None


def test_rollout_counts_come_from_the_last_sample() -> None:
    samples = [make_sample(1, pushed=3), make_sample(2, pushed=9, dropped={"stale": 2, "old": 5, "none": 0})]

    numbers = key_numbers([], samples, b_ratio=None)

    assert numbers.rollouts_pushed == 9
    assert list(numbers.drops.items()) == [("old", 5), ("stale", 2)]
    assert numbers.restarts == {"producer": 1}
    assert numbers.duration_s == 1.0


def test_objects_dropped_in_parsing_are_summed_over_steps_by_reason() -> None:
    steps = [
        make_step(0, **{"rollout/dropped_bbox_invalid": 2, "rollout/matched": 7}),
        make_step(1, **{"rollout/dropped_bbox_invalid": 1, "rollout/dropped_wrong_arity": 4}),
    ]

    assert key_numbers(steps, [], b_ratio=None).object_drops == {"wrong_arity": 4, "bbox_invalid": 3}


def test_an_empty_run_has_no_numbers_rather_than_zeros() -> None:
    numbers = key_numbers([], [], b_ratio="0.4")

    assert numbers.realised_b_ratio is None
    assert numbers.idle_share is None
    assert numbers.rollouts_pushed is None
    assert numbers.duration_s is None
    assert numbers.num_scheduled_b_steps == 0


@pytest.mark.parametrize("value", [None, "3", True, float("nan"), float("inf"), [1], {}])
def test_what_is_no_finite_number_reads_as_none(value: object) -> None:
    assert number({"x": value}, "x") is None
    assert counts({"x": value}, "x") == {}


def test_only_an_a_step_that_was_due_to_be_b_is_a_skip() -> None:
    assert is_skip(make_step(kind="A", reason="queue_short"))
    assert not is_skip(make_step(kind="A", reason="schedule"))
    assert not is_skip(make_step(kind="B", reason="claimed"))
    assert not is_skip({"kind": "A", "time_ms": START_MS})
