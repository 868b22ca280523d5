"""Decisions, deadlines, early stopping and the learning rate, on one rank and with a clock that is told."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from broker_schemas.errors import DeadlinePassed, RunStopped
from broker_schemas.records.packs import StepClaim
from learner.checkpoints import TrainerState
from learner.distributed import Ranks
from learner.early_stopping import note_evaluation, stop_reason, watched_value
from learner.ground_truth_only import GroundTruthOnlyBroker
from learner.optimization import learning_rate_at
from learner.step_decision import decide_step
from learner.stop_request import StopRequest
from tests.builders.learner_fakes import FakeBroker
from tests.builders.settings import early_stop_settings, optimization_settings


class NoPause(StopRequest):
    """A stop request whose pauses take no time."""

    def wait(self, seconds: float) -> None:
        return


def decide(broker: FakeBroker | GroundTruthOnlyBroker, **changes: object) -> StepClaim | None:
    seconds: Iterator[int] = count()
    fields = {
        "optimizer_step": 1,
        "policy_version": 1,
        "b_ratio": "0.5",
        "ranks": Ranks(rank=0, world_size=1, device=torch.device("cpu"), stall_timeout_s=10),
        "broker": broker,
        "stop": NoPause(),
        "stall_timeout_s": 20.0,
        "clock": lambda: float(next(seconds)),
    }
    return decide_step(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.req("Q-7", "S-1")
def test_the_schedule_and_the_broker_decide_the_kind() -> None:
    even, odd = decide(FakeBroker(1), optimizer_step=0), decide(FakeBroker(1), optimizer_step=1)
    assert even is not None
    assert odd is not None
    assert (even.kind, odd.kind) == ("A", "B")
    assert odd.num_segments == 6


def test_an_open_decision_is_asked_for_again() -> None:
    broker = FakeBroker(1, answers_after=5)
    claim = decide(broker)
    assert claim is not None
    assert broker.num_asked == 6


@pytest.mark.req("Q-11")
def test_a_queue_that_never_answers_ends_the_run_at_nine_tenths_of_the_deadline() -> None:
    broker = FakeBroker(1, answers_after=10_000)
    with pytest.raises(DeadlinePassed, match=r"optimizer step 1: .* within 18 s"):
        decide(broker)
    assert broker.num_asked == 18


def test_a_stop_request_ends_the_wait_without_a_claim() -> None:
    stop, broker = NoPause(), FakeBroker(1, answers_after=10_000)
    stop.set()
    assert decide(broker, stop=stop) is None
    assert broker.num_asked == 0


def test_without_a_queue_every_step_is_a_and_rollouts_are_refused() -> None:
    claim = decide(GroundTruthOnlyBroker(), b_ratio="0")
    assert claim is not None
    assert claim.kind == "A"
    with pytest.raises(RunStopped, match="no queue"):
        decide(GroundTruthOnlyBroker(), b_ratio="1")


def test_a_first_signal_asks_and_leaves_the_second_to_end_the_process() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    try:
        stop.follow_signals()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_early_stop_by_target_and_by_patience() -> None:
    state = TrainerState(optimizer_step=0)
    patience = early_stop_settings(patience=2)
    reasons = []
    for f1 in (0.3, 0.5, 0.5, 0.4):
        state = note_evaluation(state, f1)
        reasons.append(stop_reason(state, f1, patience))
    assert reasons[:3] == [None, None, None]
    assert reasons[3] == "no better validation f1 than 0.500 in 2 evaluations"
    assert stop_reason(state, 0.61, early_stop_settings(target=0.6)) is not None
    assert stop_reason(state, 0.59, early_stop_settings(target=0.6)) is None


@pytest.mark.req("U-5")
def test_early_stop_watches_any_number_and_knows_which_way_is_better() -> None:
    ap = early_stop_settings(metric="map", target=0.4)
    assert (
        stop_reason(TrainerState(optimizer_step=1), 0.41, ap) == "validation map 0.410 reached its target 0.4"
    )
    invalid = early_stop_settings(metric="parse_invalid_rate", target=0.05, patience=1)
    state = note_evaluation(TrainerState(optimizer_step=0), 0.5, "parse_invalid_rate")
    state = note_evaluation(state, 0.2, "parse_invalid_rate")
    assert (state.evaluations_since_best, stop_reason(state, 0.2, invalid)) == (0, None)
    state = note_evaluation(state, 0.3, "parse_invalid_rate")
    assert (
        stop_reason(state, 0.3, invalid)
        == "no better validation parse_invalid_rate than 0.200 in 1 evaluations"
    )
    assert stop_reason(state, 0.04, invalid) is not None


@pytest.mark.req("U-5")
def test_a_watched_number_that_an_evaluation_lacks_ends_the_run_by_name_and_no_drops_are_none() -> None:
    results = {"eval_rollout_f1": 0.5, "eval_rollout_map": 0.25}
    assert (watched_value(results, "map"), watched_value(results, "dropped_wrong_arity")) == (0.25, 0.0)
    with pytest.raises(
        RunStopped, match="'map_small', which this evaluation does not have.* it has f1, map$"
    ):
        watched_value(results, "map_small")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    settings = optimization_settings(
        learning_rate=1.0,
        warmup_steps=2,
        max_steps=12,
        schedule=schedule,  # type: ignore[arg-type]
    )
    steps = (0, 1, 2, 7, 40)
    assert [learning_rate_at(step, settings) for step in steps] == pytest.approx(expected)


@pytest.mark.req("V-2", "Q-11")
def test_one_rank_needs_no_process_group_and_tells_its_failure_as_a_stop() -> None:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"), stall_timeout_s=1)
    assert ranks.gather({"a": 1}, what="x") == [{"a": 1}]
    assert ranks.broadcast([2], what="x") == [2]
    ranks.barrier(what="x")
    stop = ranks.announce_failure(ValueError("bad"))
    assert str(stop) == "rank 0 stopped: ValueError: bad"
    deadline = DeadlinePassed("late")
    assert ranks.announce_failure(deadline) is deadline
    ranks.close()
