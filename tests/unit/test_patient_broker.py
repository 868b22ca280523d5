"""A learner that waits for its broker: until it is back, or until the deadline, and then by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker_schemas.errors import (
    BrokerError,
    BrokerFull,
    BrokerRefused,
    BrokerUnavailable,
    DeadlinePassed,
    RollstreamError,
)
from broker_schemas.records.records import MatchedSegment
from learner.patient_broker import PatientBroker
from tests.builders.learner_fakes import FakeBroker, rollout_segment
from tests.unit.test_step_decision import decide


class AwayBroker(FakeBroker):
    """Fails ``num_failures`` times, then answers."""

    def __init__(self, num_failures: int, error: RollstreamError) -> None:
        super().__init__(1)
        self.num_failures = num_failures
        self.num_tries = 0
        self._error = error

    def fetch_segments(self, record_ids: object) -> list[MatchedSegment]:
        self._try()
        return super().fetch_segments(record_ids)  # type: ignore[arg-type]

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        self._try()
        super().settle_checkpoint(optimizer_step=optimizer_step)

    def claim_step(self, **asked: object) -> None:  # type: ignore[override]
        self._try()

    def _try(self) -> None:
        self.num_tries += 1
        if self.num_tries <= self.num_failures:
            raise self._error


def patient(broker: FakeBroker, is_stopping: Callable[[], bool] = lambda: False) -> PatientBroker:
    """Return a patient broker with a deadline of 100 s whose every pause takes a second."""
    now = [0.0]

    def pause(_: float) -> None:
        now[0] += 1.0

    return PatientBroker(
        broker, stall_timeout_s=100, clock=lambda: now[0], pause=pause, is_stopping=is_stopping
    )


@pytest.mark.req("Q-11")
@pytest.mark.parametrize("error", [BrokerUnavailable("no connection"), BrokerFull("no room")])
def test_a_broker_that_comes_back_in_time_is_waited_for(error: BrokerError) -> None:
    broker = AwayBroker(79, error)
    assert patient(broker).fetch_segments(["a"])[0].record_id == rollout_segment("a").record_id
    assert broker.num_tries == 80


@pytest.mark.req("Q-11")
def test_a_broker_that_stays_away_ends_the_wait_at_eight_tenths_of_the_deadline_by_name() -> None:
    broker = AwayBroker(10_000, BrokerUnavailable("fetching payloads: no connection"))
    with pytest.raises(DeadlinePassed, match=r"broker: .* within 80 s.*fetching payloads: no connection"):
        patient(broker).fetch_segments(["a"])
    assert broker.num_tries == 81


def test_every_absence_counts_for_itself() -> None:
    broker = AwayBroker(60, BrokerUnavailable("away"))
    waiting = patient(broker)
    waiting.settle_checkpoint(optimizer_step=1)
    broker.num_tries = 0
    waiting.settle_checkpoint(optimizer_step=2)
    assert broker.told == [("settle", 1), ("settle", 2)]


def test_a_rank_that_was_asked_to_stop_waits_ten_seconds_at_most() -> None:
    broker = AwayBroker(10_000, BrokerUnavailable("away"))
    with pytest.raises(DeadlinePassed, match="within 10 s"):
        patient(broker, is_stopping=lambda: True).settle_checkpoint(optimizer_step=1)
    assert broker.num_tries == 11


@pytest.mark.parametrize("error", [BrokerRefused("wrong password"), BrokerError("wrong type")])
def test_a_broker_that_says_no_is_not_asked_again(error: BrokerError) -> None:
    broker = AwayBroker(10_000, error)
    with pytest.raises(type(error)):
        patient(broker).settle_checkpoint(optimizer_step=1)
    assert broker.num_tries == 1


@pytest.mark.req("Q-11")
def test_a_claim_is_asked_for_again_until_its_own_deadline_and_names_the_broker() -> None:
    broker = AwayBroker(10_000, BrokerUnavailable("script claim_step: no connection"))
    with pytest.raises(DeadlinePassed, match=r"broker: .* within 18 s.*claim_step: no connection"):
        decide(broker)
    assert broker.num_tries == 18


@pytest.mark.req("Q-11")
def test_a_queue_that_is_back_but_empty_is_named_instead_of_the_broker() -> None:
    with pytest.raises(DeadlinePassed, match=r"optimizer step 1: its rollouts did not come"):
        decide(AwayBroker(3, BrokerUnavailable("away")))
