"""Rank 0 decides what an optimizer step trains; every rank hears it [Q-7]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from broker_schemas.errors import BrokerFull, BrokerUnavailable, DeadlinePassed
from broker_schemas.records.packs import StepClaim
from learner.distributed import Ranks
from learner.patient_broker import broker_away
from learner.ports import LearnerBroker
from learner.schedule import is_rollout_step
from learner.stop_request import StopRequest

ASK_AGAIN_S: Final = 0.05
FIRST_RANK_SHARE: Final = 0.9
"""Part of the deadline after which rank 0 gives up, so that the others hear its reason before their own."""


def scheduled_kind(optimizer_step: int, b_ratio: str) -> Literal["A", "B"]:
    """Return what the schedule alone says about the step [S-1]."""
    return "B" if is_rollout_step(optimizer_step, b_ratio) else "A"


def decide_step(
    *,
    optimizer_step: int,
    policy_version: int,
    b_ratio: str,
    ranks: Ranks,
    broker: LearnerBroker,
    stop: StopRequest,
    stall_timeout_s: float,
    clock: Callable[[], float],
) -> StepClaim | None:
    """Return the claim of the step on every rank, or None when rank 0 was asked to stop before one was made.

    A broker that is away is asked again. Raises DeadlinePassed when the queue gives no answer within
    ``stall_timeout_s``.
    """
    body = None
    if ranks.is_first:
        claim = _claim(
            optimizer_step, policy_version, b_ratio, broker, stop, stall_timeout_s * FIRST_RANK_SHARE, clock
        )
        body = claim.to_body() if claim is not None else None
    heard = ranks.broadcast(body, what=f"decision of optimizer step {optimizer_step}")
    return None if heard is None else StepClaim.from_body(heard)


def _claim(
    optimizer_step: int,
    policy_version: int,
    b_ratio: str,
    broker: LearnerBroker,
    stop: StopRequest,
    limit_s: float,
    clock: Callable[[], float],
) -> StepClaim | None:
    kind = scheduled_kind(optimizer_step, b_ratio)
    deadline = clock() + limit_s
    while not stop.is_set:
        away = None
        try:
            claim = broker.claim_step(
                optimizer_step=optimizer_step, scheduled_kind=kind, policy_version=policy_version
            )
            if claim is not None:
                return claim
        except (BrokerUnavailable, BrokerFull) as exc:
            away = exc
        if clock() >= deadline:
            if away is not None:
                raise broker_away(away, limit_s) from away
            raise DeadlinePassed(
                f"optimizer step {optimizer_step}: its rollouts did not come within {limit_s:g} s "
                "(0.9 of stage2_async.stall_timeout_s); are producers, matchers and the packer running?"
            )
        stop.wait(ASK_AGAIN_S)
    return None
