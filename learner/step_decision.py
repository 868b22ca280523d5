"""Rank 0 decides what an optimizer step trains; every rank hears it [Q-7]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from broker_schemas.errors import BrokerFull, BrokerUnavailable, DeadlinePassed
from broker_schemas.records.packs import ReadyPack, StepClaim
from learner.distributed import Ranks
from learner.patient_broker import broker_away
from learner.ports import LearnerBroker
from learner.schedule import is_rollout_step
from learner.stall_limits import StallLimits
from learner.stop_request import StopRequest

ASK_AGAIN_S: Final = 0.05


def scheduled_kind(optimizer_step: int, b_ratio: str) -> Literal["A", "B"]:
    """Return what the schedule alone says about the step [S-1]."""
    return "B" if is_rollout_step(optimizer_step, b_ratio) else "A"


@dataclass(frozen=True, kw_only=True)
class FilledPacks:
    """The next pack of every rank, trained while the rest of the step is generated; the claim takes it."""

    optimizer_step: int
    policy_version: int
    packs: tuple[ReadyPack, ...]

    def to_body(self) -> dict[str, Any]:
        return {**vars(self), "packs": [pack.to_body() for pack in self.packs], "filled": True}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> FilledPacks:
        return cls(
            optimizer_step=int(body["optimizer_step"]),
            policy_version=int(body["policy_version"]),
            packs=tuple(ReadyPack.from_body(pack) for pack in body["packs"]),
        )


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
    num_taken: int | None = None,
) -> StepClaim | FilledPacks | None:
    """Return the claim of the step on every rank, or None when rank 0 was asked to stop before one was made.

    With ``num_taken``, the packs that each rank has trained of the step already, it may be the next ones that
    filled instead. A broker that is away is asked again. Raises DeadlinePassed when the queue gives no answer
    within ``stall_timeout_s``.
    """
    body = None
    if ranks.is_first:
        claim = _claim(
            optimizer_step,
            policy_version,
            b_ratio,
            broker,
            stop,
            StallLimits(total_s=stall_timeout_s).decision_s,
            clock,
            num_taken,
        )
        body = claim.to_body() if claim is not None else None
    heard = ranks.broadcast(body, what=f"decision of optimizer step {optimizer_step}")
    if heard is None:
        return None
    return FilledPacks.from_body(heard) if heard.get("filled") else StepClaim.from_body(heard)


def _claim(
    optimizer_step: int,
    policy_version: int,
    b_ratio: str,
    broker: LearnerBroker,
    stop: StopRequest,
    limit_s: float,
    clock: Callable[[], float],
    num_taken: int | None,
) -> StepClaim | FilledPacks | None:
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
            filled = None if num_taken is None else broker.filled_packs(optimizer_step)
            if filled and num_taken is not None and min(len(packs) for packs in filled) > num_taken:
                return FilledPacks(
                    optimizer_step=optimizer_step,
                    policy_version=policy_version,
                    packs=tuple(packs[num_taken] for packs in filled),
                )
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
