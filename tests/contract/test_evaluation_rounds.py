"""A round of evaluation through the broker: asked, answered, gathered, settled once, and gone from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.evaluation_rounds import (
    read_evaluation_state,
    read_numbers,
    read_results,
)
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import fail_request, issue_requests
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink
from broker_schemas.records import codec
from broker_schemas.records.evaluation_state import EvaluationNumbers, EvaluationState
from broker_schemas.records.records import SegmentRecord
from consumers.evaluation_result import evaluate_rollout
from consumers.evaluator import Evaluator, EvaluatorOutlets, EvaluatorSettings
from consumers.matching import match_objects
from consumers.metrics import EvaluatorMetrics
from consumers.parsing import ParsedObject, ParsedRollout
from producers.evaluation_demand import EvaluationSettings, next_chunk
from rollstream.history.audit import take_audit
from tests.builders.records import a_rollout
from tests.builders.settings import lease_settings, match_settings

NUM_SAMPLES = 6
SETTINGS = EvaluationSettings(
    num_samples=NUM_SAMPLES, chunk_size=4, eval_every_steps=8, sync_every_steps=4, max_steps=100
)
LEASE = lease_settings(lease_ms=60_000, max_attempts=2)
GATE = match_settings(candidate_top_k=10, maskiou_gate=0.3, maskiou_resolution=256, fp_cost=1.0, fn_cost=1.0)


def ask(broker: Broker, policy_version: int) -> list[str]:
    """Ask for the next chunk as the dispatcher does; return the record ids, none where nothing is due."""
    state = read_evaluation_state(broker)
    chunk = next_chunk(state, policy_version, SETTINGS)
    if chunk is None:
        return []
    request = chunk.request(broker.keys.run)
    assert issue_requests(
        broker, [request], cursor=state.cursor, next_cursor=chunk.next_cursor, lease=LEASE, key="evaluation"
    )
    records = [
        a_rollout(
            name,
            request_id=request.request_id,
            purpose="evaluation",
            optimizer_step=request.optimizer_step,
            policy_version=policy_version,
        )
        for name in request.record_ids
    ]
    assert SegmentSink(broker).push(records) == ["ok"] * len(records)
    return list(request.record_ids)


def answer(broker: Broker, *, is_refused: bool = False) -> None:
    """Match what waits: every rollout found its one object, or the first is refused."""
    door = MatcherDoor(broker, "matcher-0")
    entries = door.read(count=100, block_ms=1)
    verdicts = [
        MatchVerdict(entry=entry, outcome="rejected", reason="image_missing", detail="x")
        if is_refused and place == 0
        else MatchVerdict(entry=entry, outcome="evaluated", result_body=a_result(entry))
        for place, entry in enumerate(entries)
    ]
    door.commit(verdicts, oldest_policy_version=0)


def a_result(entry: RawEntry) -> bytes:
    record = SegmentRecord.decode_body(entry.body or b"")
    truth = record.assistant_payload[0]
    said = ParsedObject(
        number=1, desc=truth.desc, geometry=truth.geometry, bins=truth.bins, token_indices=(0,)
    )
    parsed = ParsedRollout(
        objects=(said,),
        prefix_ids=(),
        prefix_text="",
        open_tail="",
        holds_entry=True,
        next_object_number=2,
        dropped={},
        truncated=False,
        is_invalid_rollout=False,
    )
    match = match_objects([truth], record.assistant_payload, GATE)
    return codec.encode_map(evaluate_rollout(record, parsed, match, "", GATE).to_body())


@dataclass
class Kept:
    """What an evaluator gives away; ``dies_at`` names where it is killed."""

    rows: list[Mapping[str, float | int]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    dies_at: str = ""

    def keep(self, numbers: EvaluationNumbers, results: Sequence[Mapping[str, Any]]) -> None:
        if self.dies_at == "keep":
            raise KeyboardInterrupt
        self.kept.append(len(results))

    def write(self, row: Mapping[str, float | int]) -> None:
        if self.dies_at == "write":
            raise KeyboardInterrupt
        self.rows.append(row)


def an_evaluator(broker: Broker, kept: Kept) -> Evaluator:
    outlets = EvaluatorOutlets(
        keep=kept.keep,
        write=kept.write,
        written_steps=frozenset(int(row["optimizer_step"]) for row in kept.rows),
    )
    settings = EvaluatorSettings(num_samples=NUM_SAMPLES, sync_every_steps=4, poll_s=0.1)
    evaluator = Evaluator(broker, EvaluatorMetrics(CollectorRegistry()), settings, outlets)
    evaluator.write_what_is_missing()
    return evaluator


def used_bytes(broker: Broker) -> int:
    return read_status(broker, 1).total("bytes")


@pytest.mark.req("L-8", "Q-12", "Q-14")
def test_a_round_is_asked_answered_and_settled_and_leaves_nothing_behind(broker: Broker) -> None:
    publish_policy(broker, policy_version=3, optimizer_step=12, weights_path="w")
    before = used_bytes(broker)
    kept = Kept()
    evaluator = an_evaluator(broker, kept)
    assert len(ask(broker, 2)) == 4
    status = read_status(broker, 1)
    assert (status.outstanding, status.evaluation_outstanding) == (0, 4)
    answer(broker)
    assert used_bytes(broker) > before, "results are counted against the budget"
    evaluator.step()
    assert kept.rows == [], "two samples are not asked for yet"
    assert len(ask(broker, 3)) == 2
    assert ask(broker, 3) == [], "the round is whole"
    answer(broker)
    evaluator.step()

    (row,) = kept.rows
    assert (row["optimizer_step"], row["policy_version"], row["highest_policy_version"]) == (7, 2, 3)
    assert (row["eval_rollout_samples"], row["eval_rollout_f1"]) == (6, 1.0)
    assert (row["eval_rollout_f1_class_50"], row["eval_rollout_unanswered"]) == (1.0, 0)
    assert read_results(broker, after="0-0") == []
    assert used_bytes(broker) == before
    assert [numbers.optimizer_step for numbers in read_numbers(broker)] == [8]
    assert read_numbers(broker, beyond_step=8) == []
    assert read_evaluation_state(broker) == EvaluationState(policy_version=2, num_asked=6, settled=2)
    audit = take_audit(read_events(broker), counters=read_status(broker, 1).counters)
    assert (audit.balanced, audit.faults, audit.asked) == (True, [], 0)
    assert audit.evaluation == {"asked": 6, "answered": 6, "rejected": 0, "in_flight": 0}


@pytest.mark.req("L-8")
@pytest.mark.parametrize("dies_at", ["keep", "write"])
def test_an_evaluator_that_is_killed_goes_on_and_writes_each_round_once(broker: Broker, dies_at: str) -> None:
    """Killed before its numbers are settled, or after that and before they are written down."""
    ask(broker, 2)
    ask(broker, 2)
    answer(broker)
    kept = Kept(dies_at=dies_at)
    with pytest.raises(KeyboardInterrupt):
        an_evaluator(broker, kept).step()
    assert kept.rows == []
    kept.dies_at = ""
    for _ in range(2):
        an_evaluator(broker, kept).step()
    assert [row["optimizer_step"] for row in kept.rows] == [7]
    assert read_status(broker, 1).total("evaluations_settled") == 1
    assert read_results(broker, after="0-0") == []


@pytest.mark.req("L-8", "Q-14")
def test_images_without_an_answer_are_counted_and_hold_no_round_up(broker: Broker) -> None:
    ask(broker, 2)
    answer(broker, is_refused=True)
    state = read_evaluation_state(broker)
    chunk = next_chunk(state, 2, SETTINGS)
    assert chunk is not None
    request = chunk.request(broker.keys.run)
    issue_requests(
        broker, [request], cursor=state.cursor, next_cursor=chunk.next_cursor, lease=LEASE, key="evaluation"
    )
    assert fail_request(broker, request.request_id, reason="generation_failed", detail="x") == 2
    kept = Kept()
    an_evaluator(broker, kept).step()
    (row,) = kept.rows
    assert (row["eval_rollout_samples"], row["eval_rollout_unanswered"]) == (3, 3)
    audit = take_audit(read_events(broker), counters=read_status(broker, 1).counters)
    assert audit.balanced, audit.faults
    assert audit.evaluation == {"asked": 6, "answered": 3, "rejected": 3, "in_flight": 0}
    assert read_status(broker, 1).by_reason("rejected") == {}


def test_a_result_that_cannot_be_read_goes_and_stops_nothing(broker: Broker) -> None:
    broker.client.xadd(broker.keys.named("evaluations"), {"record_id": "x", "body": b"no map"})
    ask(broker, 2)
    ask(broker, 2)
    answer(broker)
    kept = Kept()
    an_evaluator(broker, kept).step()
    assert kept.rows[0]["eval_rollout_samples"] == 6
    assert read_results(broker, after="0-0") == []


def test_a_rollout_comes_back_for_what_it_was_asked_for_alone(broker: Broker) -> None:
    """To train on an answer to the validation set, or to evaluate one of training, is refused."""
    state = read_evaluation_state(broker)
    chunk = next_chunk(state, 2, SETTINGS)
    assert chunk is not None
    request = chunk.request(broker.keys.run)
    issue_requests(
        broker, [request], cursor=state.cursor, next_cursor=chunk.next_cursor, lease=LEASE, key="evaluation"
    )
    name = request.record_ids[0]
    assert SegmentSink(broker).push([a_rollout(name, request_id=request.request_id)]) == ["bad_id"]
