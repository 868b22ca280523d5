"""What becomes of a role that ended."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollstream.stack.restart_policy import (
    Decision,
    Finished,
    RestartSettings,
    RoleHistory,
    StartAgain,
    StopStack,
    decide_after_exit,
)

SETTINGS = RestartSettings(first_delay_s=0.5, longest_delay_s=15.0, healthy_after_s=60.0, deaths_allowed=5)


def decide(exit_status: int = 1, history: RoleHistory | None = None, **changes: Any) -> Decision:
    arguments: dict[str, Any] = {"ran_s": 1.0, "may_finish": False, "settings": SETTINGS} | changes
    return decide_after_exit(exit_status, history or RoleHistory(), **arguments)


def start_again(exit_status: int = 1, history: RoleHistory | None = None, **changes: Any) -> StartAgain:
    decision = decide(exit_status, history, **changes)
    assert isinstance(decision, StartAgain)
    return decision


def test_a_learner_that_ends_with_status_zero_has_finished_the_run() -> None:
    assert decide(0, may_finish=True) == Finished()


def test_any_other_role_that_ends_unasked_with_status_zero_counts_as_dead() -> None:
    assert start_again(0).history == RoleHistory(deaths_in_row=1, num_restarts=1)


@pytest.mark.parametrize("exit_status", [2, 3])
@pytest.mark.parametrize("may_finish", [True, False])
def test_a_role_that_says_why_it_cannot_go_on_stops_the_stack_with_its_status(
    exit_status: int, may_finish: bool
) -> None:
    # given a role that has been healthy for long
    decision = decide(exit_status, may_finish=may_finish, ran_s=1e6)
    # then another start would end the same way
    assert decision == StopStack(exit_status, is_refusal=True)


@pytest.mark.parametrize("exit_status", [1, 4, 7, 137, -9, -11])
@pytest.mark.parametrize("may_finish", [True, False])
def test_any_other_end_is_a_death_after_which_the_role_starts_again(
    exit_status: int, may_finish: bool
) -> None:
    decision = start_again(exit_status, may_finish=may_finish)
    assert decision == StartAgain(0.5, RoleHistory(deaths_in_row=1, num_restarts=1))


def test_delays_double_up_to_the_longest_one() -> None:
    settings = RestartSettings(deaths_allowed=9)
    history, delays = RoleHistory(), []
    for _ in range(8):
        decision = start_again(-9, history, settings=settings)
        history = decision.history
        delays.append(decision.delay_s)
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]


def test_the_fifth_death_in_a_row_stops_the_stack_for_a_named_reason() -> None:
    history = RoleHistory()
    for _ in range(4):
        history = start_again(1, history).history
    assert decide(1, history) == StopStack(3, is_refusal=False)


def test_a_minute_of_health_forgives_the_deaths_before_it_but_keeps_counting_restarts() -> None:
    history = RoleHistory(deaths_in_row=4, num_restarts=4)
    assert start_again(1, history, ran_s=60.0) == StartAgain(
        0.5, RoleHistory(deaths_in_row=1, num_restarts=5)
    )
    assert decide(1, history, ran_s=59.9) == StopStack(3, is_refusal=False)


@given(runs_s=st.lists(st.floats(0, 200), max_size=40))
def test_the_stack_stops_exactly_at_the_first_five_deaths_without_health_between(runs_s: list[float]) -> None:
    # given a plain count of the deaths in a row
    in_row, expected = 0, None
    for number, ran_s in enumerate(runs_s):
        in_row = 1 if ran_s >= 60.0 else in_row + 1
        if in_row == 5:
            expected = number
            break
    # when a role dies again and again
    history, stopped = RoleHistory(), None
    for number, ran_s in enumerate(runs_s):
        decision = decide(1, history, ran_s=ran_s)
        if isinstance(decision, StopStack):
            stopped = number
            break
        assert isinstance(decision, StartAgain)
        assert 0.5 <= decision.delay_s <= 15.0
        history = decision.history
    # then
    assert stopped == expected
