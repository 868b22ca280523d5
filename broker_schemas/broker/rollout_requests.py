"""Requests for rollouts: asked for under a lease, run again when a producer dies, given up with a reason."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.records.records import NOT_STEP_BOUND, Purpose

CursorKey = Literal["dispatch", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One generation chunk: ``samples`` are (sample index, seed) pairs, one record each, in order.

    Indices are those of the training set, or of the validation set where ``purpose`` is evaluation.
    """

    request_id: str
    samples: tuple[tuple[int, int], ...]
    policy_version: int
    purpose: Purpose = "train"
    optimizer_step: int = NOT_STEP_BOUND

    @property
    def record_ids(self) -> tuple[str, ...]:
        """Ids of the records it will make: the same whoever runs it, so a second run is a duplicate."""
        return tuple(f"{self.request_id}.{index}" for index in range(len(self.samples)))

    def to_spec(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "samples": [list(pair) for pair in self.samples],
            "policy_version": self.policy_version,
            "purpose": self.purpose,
            "optimizer_step": self.optimizer_step,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> RolloutRequest:
        return cls(
            request_id=str(spec["request_id"]),
            samples=tuple((int(index), int(seed)) for index, seed in spec["samples"]),
            policy_version=int(spec["policy_version"]),
            purpose=spec["purpose"],
            optimizer_step=int(spec["optimizer_step"]),
        )


@dataclass(frozen=True, kw_only=True)
class ReissuedRequest:
    """A request whose time has come; ``attempt`` counts from 1.

    ``waits``: no worker has taken this attempt yet, so its job should still be in the queue.
    """

    request: RolloutRequest
    attempt: int
    waits: bool = False


@dataclass(frozen=True, kw_only=True)
class LeaseSettings:
    """``lease_ms`` without a sign of life of its worker, ``max_attempts`` before a request is given up."""

    lease_ms: int = 30_000
    max_attempts: int


def read_cursor(broker: Broker, key: CursorKey = "dispatch") -> int:
    """Return how many samples have been asked for since the start of the run; raises BrokerError."""
    with broker_errors("reading the data set position"):
        return int(broker.client.hget(broker.keys.named(key), "cursor") or 0)


def say_demand_advice(broker: Broker, advice: str) -> None:
    """Leave a sentence for whoever watches the run, or nothing; raises BrokerError."""
    with broker_errors("writing the advice of demand control"):
        broker.client.hset(broker.keys.named("dispatch"), "advice", advice)


def read_stale_after(broker: Broker) -> str:
    """Return the place in the log up to which stale rollouts were asked for again, "" before the first."""
    with broker_errors("reading what was asked for again"):
        place = broker.client.hget(broker.keys.named("dispatch"), "stale_after")
    return place.decode() if isinstance(place, bytes) else ""


def issue_requests(
    broker: Broker,
    requests: Sequence[RolloutRequest],
    *,
    cursor: int,
    next_cursor: int,
    lease: LeaseSettings,
    stale_after: tuple[str, str] | None = None,
    key: CursorKey = "dispatch",
) -> bool:
    """Open ``requests`` and move the data set position from ``cursor`` to ``next_cursor``, or do neither.

    ``key`` holds that position; the requests are all of one purpose.
    ``stale_after``: the place in the log of what was asked for again, before and after this call; None where
    nothing is. False: another dispatcher moved the position first. No lease runs
    before a worker takes a request. Raises BrokerError.
    """
    # the client repeats a call whose reply was lost: it must be known as the same call
    this_call = secrets.token_hex(8)
    arguments: list[str | int] = [lease.lease_ms, cursor, next_cursor, this_call, len(requests)]
    for request in requests:
        arguments += [
            request.request_id,
            json.dumps(request.to_spec(), separators=(",", ":")),
            len(request.samples),
            " ".join(request.record_ids),
            request.purpose,
            request.optimizer_step,
            request.policy_version,
        ]
    arguments += stale_after or ()
    reply = broker.run("issue_requests", ["requests", key], arguments)
    return bool(reply[0])


def renew_lease(broker: Broker, request_id: str, lease: LeaseSettings) -> bool:
    """Take or prolong the lease; False when the request is closed and its records are no longer wanted."""
    return bool(broker.run("renew_request", ["requests"], [request_id, lease.lease_ms, 1]))


def release_lease(broker: Broker, request_id: str, lease: LeaseSettings) -> bool:
    """Say that the request waits for a worker again; False when it is closed. Raises BrokerError."""
    return bool(broker.run("renew_request", ["requests"], [request_id, lease.lease_ms, 0]))


def reissue_expired(broker: Broker, lease: LeaseSettings, *, at_most: int = 64) -> list[ReissuedRequest]:
    """Open requests whose lease ended again, give up those out of attempts; return what needs a look.

    Among them are those that no worker has taken for ``lease_ms``. Raises BrokerError.
    """
    found: list[ReissuedRequest] = []
    while True:
        num_due, *flat = broker.run(
            "reissue_requests", ["requests"], [lease.lease_ms, lease.max_attempts, at_most]
        )
        rows = zip(flat[1::4], flat[2::4], flat[3::4], strict=True)
        found += [
            ReissuedRequest(
                request=RolloutRequest.from_spec(json.loads(spec)), attempt=int(attempt), waits=bool(waits)
            )
            for attempt, spec, waits in rows
        ]
        if num_due < at_most or lease.lease_ms <= 0:
            return found


def fail_request(broker: Broker, request_id: str, *, reason: str, detail: str) -> int:
    """Give a request up; return how many records are accounted for as rejected by it."""
    one_line = " ".join(detail.split())[:500]
    return int(broker.run("fail_request", ["requests"], [request_id, reason, one_line]))
