"""Rounds of evaluation in the broker: how far one is asked for and answered, its results, its numbers.

A round asks the validation set once, at one published policy; the next begins when it is settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.records import codec
from broker_schemas.records.evaluation_state import ROUND_SPAN, EvaluationNumbers, EvaluationState

READ_AT_ONCE: Final = 256


def read_evaluation_state(broker: Broker) -> EvaluationState:
    """Return where evaluation stands; raises BrokerError."""
    # the position first: nothing of a round is asked for after it is complete, so its end is never missed
    keys = broker.keys
    with broker_errors("reading the rounds of evaluation"):
        pipe = broker.client.pipeline(transaction=False)
        pipe.hmget(keys.named("evaluation"), "cursor", "settled")
        pipe.hmget(keys.named("counters"), "evaluation_open_records", "evaluation_waiting")
        (cursor, settled), counted = pipe.execute()
    policy_version, num_asked = divmod(int(cursor or 0), ROUND_SPAN)
    return EvaluationState(
        policy_version=policy_version,
        num_asked=num_asked,
        num_outstanding=sum(int(number or 0) for number in counted),
        settled=int(settled or 0),
    )


def read_results(broker: Broker, *, after: str) -> list[tuple[str, bytes]]:
    """Return entry ids and bodies of results beyond the entry ``after`` ("0-0": all); raises BrokerError."""
    found: list[tuple[str, bytes]] = []
    while True:
        with broker_errors("reading evaluation results"):
            rows: Any = broker.client.xrange(
                broker.keys.named("evaluations"), min=f"({after}", count=READ_AT_ONCE
            )
        found += [(entry_id.decode(), fields.get(b"body", b"")) for entry_id, fields in rows]
        if len(rows) < READ_AT_ONCE:
            return found
        after = found[-1][0]


def settle_evaluation(
    broker: Broker, numbers: EvaluationNumbers, *, num_results: int, entry_ids: Sequence[str]
) -> bool:
    """Take the results of a round away and leave its numbers; False where it was settled before."""
    arguments: list[str | int | bytes] = [
        numbers.policy_version,
        numbers.optimizer_step,
        codec.encode_map(numbers.to_body()),
        num_results,
        len(entry_ids),
        *entry_ids,
    ]
    named_keys = ["evaluations", "evaluation", "evaluation_numbers"]
    return bool(broker.run("settle_evaluation", named_keys, arguments))


def read_numbers(broker: Broker, *, beyond_step: int = 0) -> list[EvaluationNumbers]:
    """Return the numbers of the latest rounds beyond an optimizer step, oldest first; raises BrokerError."""
    with broker_errors("reading the numbers of evaluations"):
        rows: Any = broker.client.xrange(broker.keys.named("evaluation_numbers"))
    return [
        EvaluationNumbers(**codec.decode_map(fields[b"body"]))
        for _, fields in rows
        if int(fields[b"optimizer_step"]) > beyond_step
    ]
