"""The evaluator's loop: gathers what matchers say of evaluation rollouts, ends each round with its numbers.

It keeps nothing that the broker does not have: results stay there until their round is settled, and its
numbers until they are written down, so that a killed evaluator begins again where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.evaluation_rounds import (
    read_evaluation_state,
    read_numbers,
    read_results,
    settle_evaluation,
)
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.errors import RecordError
from broker_schemas.method.evaluation_numbers import PREFIX, in_one_line
from broker_schemas.records import codec
from broker_schemas.records.evaluation_state import EvaluationNumbers, EvaluationState
from consumers.evaluation_metrics import evaluation_metrics
from consumers.evaluation_result import EvaluationResult
from consumers.metrics import EvaluatorMetrics

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluatorSettings:
    """``num_samples``: of a round, as the dispatcher asks for them."""

    num_samples: int
    sync_every_steps: int
    poll_s: float


@dataclass(frozen=True, kw_only=True)
class EvaluatorOutlets:
    """Where numbers go. ``keep`` gets a round's numbers and results before it is settled, and may get them
    again after a kill; ``write`` gets a row of the log once, ``written_steps`` are those it has already.
    """

    keep: Callable[[EvaluationNumbers, Sequence[Row]], None]
    write: Callable[[Mapping[str, float | int]], None]
    written_steps: frozenset[int]


class Evaluator:
    """One evaluator; the run has one at a time."""

    def __init__(
        self,
        broker: Broker,
        metrics: EvaluatorMetrics,
        settings: EvaluatorSettings,
        outlets: EvaluatorOutlets,
    ) -> None:
        self._broker = broker
        self._metrics = metrics
        self._settings = settings
        self._outlets = outlets
        self._written = set(outlets.written_steps)
        self._written_upto = -1
        self._last_id = "0-0"
        self._results: dict[str, Row] = {}
        self._unreadable: list[str] = []

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``; a broker that is away is waited for."""
        self.write_what_is_missing()
        keep_stepping(self.step, stop, role="evaluator", pause_s=self._settings.poll_s)

    def step(self) -> int:
        """Look once and settle what is complete; return how many results came. Raises BrokerError."""
        # the state first: a result is there as soon as its record counts as answered
        state = read_evaluation_state(self._broker)
        num_new = self._read()
        self._metrics.on_waiting(len(self._results))
        if state.settled < state.policy_version and state.is_answered(self._settings.num_samples):
            self._settle(state)
        return num_new

    def write_what_is_missing(self) -> None:
        """Write the rows of settled rounds that the log lacks, oldest first."""
        for numbers in read_numbers(self._broker, beyond_step=self._written_upto):
            row = row_of(numbers)
            if row["optimizer_step"] not in self._written:
                self._outlets.write(row)
                self._written.add(int(row["optimizer_step"]))
            self._written_upto = numbers.optimizer_step
            self._metrics.on_numbers(numbers)

    def _read(self) -> int:
        found = read_results(self._broker, after=self._last_id)
        for entry_id, body in found:
            self._last_id = entry_id
            try:
                self._results[entry_id] = EvaluationResult.from_body(codec.decode_map(body)).to_body()
            except RecordError as exc:
                log.warning("evaluator: result %s cannot be read: %s", entry_id, exc)
                self._unreadable.append(entry_id)
        return len(found)

    def _settle(self, state: EvaluationState) -> None:
        optimizer_step = state.policy_version * self._settings.sync_every_steps
        of_round = [result for result in self._results.values() if result["optimizer_step"] == optimizer_step]
        num_unanswered = max(0, state.num_asked - len(of_round))
        metrics = evaluation_metrics(of_round, num_unanswered=num_unanswered)
        numbers = EvaluationNumbers(
            optimizer_step=optimizer_step,
            policy_version=state.policy_version,
            highest_policy_version=max(
                [state.policy_version, *(result["policy_version"] for result in of_round)]
            ),
            metrics=metrics,
        )
        self._outlets.keep(numbers, of_round)
        entry_ids = [*self._results, *self._unreadable]
        settle_evaluation(self._broker, numbers, num_results=len(of_round), entry_ids=entry_ids)
        self._results, self._unreadable = {}, []
        log.info(
            "evaluation of policy version %d (after %d steps, answered by versions up to %d): %s",
            *(numbers.policy_version, optimizer_step, numbers.highest_policy_version, in_one_line(metrics)),
        )
        if num_unanswered:
            log.warning(
                "evaluation of policy version %d: %d of %d images have no answer, their rollouts were "
                "given up or refused; the audit says why",
                *(numbers.policy_version, num_unanswered, state.num_asked),
            )
        self.write_what_is_missing()


def row_of(numbers: EvaluationNumbers) -> dict[str, float | int]:
    """Return the row of the evaluation log; like a step's row it names the last step that was done."""
    return {
        "optimizer_step": numbers.optimizer_step - 1,
        "policy_version": numbers.policy_version,
        "highest_policy_version": numbers.highest_policy_version,
        **{name: value for name, value in numbers.metrics.items() if name.startswith(PREFIX)},
    }
