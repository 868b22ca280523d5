"""When the validation set is asked for, and that training's places are never taken for it."""

from __future__ import annotations

from typing import Any

import pytest

from broker_schemas.records.evaluation_state import ROUND_SPAN, EvaluationState
from broker_schemas.records.run_status import RunStatus
from producers.evaluation_demand import (
    TRAINED_TO_EVALUATED,
    EvaluationSettings,
    has_room,
    is_round_due,
    next_chunk,
)

SETTINGS = EvaluationSettings(
    num_samples=10, chunk_size=4, eval_every_steps=8, sync_every_steps=4, max_steps=30
)


def a_status(**counters: int) -> RunStatus:
    return RunStatus(
        policy_version=3,
        ready_depths=(0,),
        segments_waiting=counters.get("evaluation_waiting", 0),
        matched_waiting=0,
        open_claims=0,
        counters=counters,
        open_step=None,
    )


@pytest.mark.req("L-8")
def test_a_round_is_due_at_the_first_policy_of_each_multiple_and_at_the_last() -> None:
    """Versions are published every 4 steps, evaluations are due every 8: every other version."""
    due = [version for version in range(1, 8) if is_round_due(version, 0, SETTINGS)]
    assert due[0] == 2
    assert not is_round_due(3, 2, SETTINGS)
    assert is_round_due(4, 2, SETTINGS)
    assert is_round_due(5, 2, SETTINGS), "a version that was passed over makes the next one due"
    rare = EvaluationSettings(
        num_samples=10, chunk_size=4, eval_every_steps=100, sync_every_steps=4, max_steps=12
    )
    assert [version for version in range(4) if is_round_due(version, 0, rare)] == [3]
    assert not is_round_due(3, 3, rare)


def test_a_round_asks_for_every_sample_once_whatever_is_published_meanwhile() -> None:
    state, asked, ids = EvaluationState(), list[int](), set[str]()
    for policy_version in (2, 3, 5, 9):
        chunk = next_chunk(state, policy_version, SETTINGS)
        if chunk is None:
            break
        request = chunk.request("run")
        assert (request.policy_version, request.optimizer_step, request.purpose) == (2, 8, "evaluation")
        asked += [index for index, _ in request.samples]
        ids |= set(request.record_ids)
        version, num_asked = divmod(chunk.next_cursor, ROUND_SPAN)
        state = EvaluationState(policy_version=version, num_asked=num_asked)
    assert asked == list(range(10))
    assert len(ids) == 10


def test_the_next_round_begins_when_the_last_has_its_numbers() -> None:
    whole: dict[str, Any] = {"policy_version": 2, "num_asked": 10}
    assert next_chunk(EvaluationState(**whole, num_outstanding=1), 4, SETTINGS) is None
    assert next_chunk(EvaluationState(**whole), 4, SETTINGS) is None
    chunk = next_chunk(EvaluationState(**whole, settled=2), 9, SETTINGS)
    assert chunk is not None
    assert (chunk.policy_version, chunk.start, chunk.end) == (9, 0, 4)
    assert next_chunk(EvaluationState(**whole, settled=2), 3, SETTINGS) is None


@pytest.mark.req("L-8", "Q-16")
def test_training_comes_first_while_it_has_rollouts_under_way() -> None:
    def room(pushed_before: int = 0, num_workers: int = 1, **counters: int) -> bool:
        return has_room(
            a_status(**counters),
            pushed_at_last_chunk=pushed_before,
            num_workers=num_workers,
            settings=SETTINGS,
        )

    enough = TRAINED_TO_EVALUATED * SETTINGS.chunk_size
    assert room(), "nothing is under way"
    assert not room(open_records=4, pushed=enough - 1)
    assert room(open_records=4, pushed=enough)
    assert not room(pushed_before=5, open_records=4, pushed=enough + 4)
    assert not room(evaluation_open_records=4), "one chunk at a time"
    assert not room(evaluation_waiting=1)
    assert room(num_workers=8, evaluation_open_records=4), "one worker in four"
    assert not room(num_workers=8, evaluation_open_records=8)
    assert room(committed_steps=30, open_records=40, pushed=0), "the run is over: nothing is in its way"


@pytest.mark.req("L-8", "Q-16")
def test_what_is_asked_for_to_evaluate_counts_in_no_sum_of_training() -> None:
    status = a_status(evaluation_open_records=7, evaluation_waiting=3, open_records=5)
    assert (status.outstanding, status.evaluation_outstanding) == (5, 10)
