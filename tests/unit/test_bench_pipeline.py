"""The arithmetic of the pipeline's budgets."""

from __future__ import annotations

from typing import Any

import pytest

from rollstream.bench.pipeline import PipelineBenchReport, PipelineTimes, times_of


def row(kind: str, wait_s: float, busy_s: float, num_tokens: int = 100) -> dict[str, Any]:
    return {
        "kind": kind,
        "wait_s": wait_s,
        "busy_s": busy_s,
        "step_s": wait_s + busy_s,
        "num_tokens": num_tokens,
    }


def times(*, wait_s: float, busy_s: float, num_tokens: float = 100.0) -> PipelineTimes:
    return PipelineTimes(
        num_steps=10,
        num_b_steps=5,
        step_s=wait_s + busy_s,
        wait_s=wait_s,
        busy_s=busy_s,
        num_tokens=num_tokens,
    )


def test_times_leave_out_the_warm_up_and_one_step_that_stood_still() -> None:
    warm_up = [row("A", 9.0, 9.0), row("B", 9.0, 9.0)]
    measured = [row("A", 0.0, 1.0), row("B", 2.0, 3.0, 300)] * 3
    measured[3] = row("B", 2.0, 50.0, 300)

    found = times_of([*warm_up, *measured])

    assert (found.num_steps, found.num_b_steps) == (6, 3)
    assert (found.wait_s, found.busy_s, found.step_s) == (1.0, 2.0, 3.0)
    assert found.num_tokens == 200


def test_perfect_overlap_is_the_ideal() -> None:
    on_policy = times(wait_s=1.0, busy_s=2.0)

    report = PipelineBenchReport(on_policy=on_policy, overlapped=times(wait_s=0.0, busy_s=2.0), num_skipped=0)

    assert report.ideal_speedup == pytest.approx(1.5)
    assert report.speed_of_ideal == pytest.approx(1.0)
    assert report.slowdown == pytest.approx(1.0)
    assert report.is_within_budget


def test_more_work_in_a_step_is_no_slowness_and_a_slower_token_is() -> None:
    on_policy = times(wait_s=1.0, busy_s=2.0)
    double = times(wait_s=0.0, busy_s=4.0, num_tokens=200)
    slower = times(wait_s=0.0, busy_s=3.0)

    assert PipelineBenchReport(
        on_policy=on_policy, overlapped=double, num_skipped=0
    ).speed_of_ideal == pytest.approx(1.0)
    report = PipelineBenchReport(on_policy=on_policy, overlapped=slower, num_skipped=0)
    assert report.slowdown == pytest.approx(1.5)
    assert not report.is_within_budget
