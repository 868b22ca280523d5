"""When the validation set is asked for, and how much of it at a time. Pure.

A round asks it once, at the first policy published at or after each multiple of ``eval_every_steps``. The
next begins when the numbers of the one before are there: slow ones make rounds rarer, they pile nothing up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.broker.status import RunStatus
from broker_schemas.records.evaluation_state import ROUND_SPAN, EvaluationState

TRAINED_TO_EVALUATED: Final = 3
"""While training wants rollouts, so many of its own are written for each one that evaluates."""
WORKERS_A_CHUNK: Final = 4
"""One chunk in this many workers may evaluate at a time."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """``num_samples``: of the validation set; ``chunk_size``: rollouts of one request."""

    num_samples: int
    chunk_size: int
    eval_every_steps: int
    sync_every_steps: int
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class EvaluationChunk:
    """Samples ``start`` to ``end`` - 1 of the round of ``policy_version``."""

    policy_version: int
    optimizer_step: int
    start: int
    end: int

    @property
    def next_cursor(self) -> int:
        return self.policy_version * ROUND_SPAN + self.end

    def request(self, run: str) -> RolloutRequest:
        """Return the request; its id names round and place, so that the same place is the same request."""
        return RolloutRequest(
            request_id=f"{run}-evaluation-{self.policy_version}-{self.start:06d}",
            samples=tuple((index, 0) for index in range(self.start, self.end)),
            policy_version=self.policy_version,
            purpose="evaluation",
            optimizer_step=self.optimizer_step,
        )


def is_round_due(policy_version: int, last_version: int, settings: EvaluationSettings) -> bool:
    """Say whether this policy is to be evaluated, the last one that was being ``last_version`` (0: none)."""
    done, before = (version * settings.sync_every_steps for version in (policy_version, last_version))
    every = settings.eval_every_steps
    return done > before and (done // every > before // every or done >= settings.max_steps)


def next_chunk(
    state: EvaluationState, policy_version: int, settings: EvaluationSettings
) -> EvaluationChunk | None:
    """Return what of the validation set to ask for next; None where nothing is due."""
    version, start = state.policy_version, state.num_asked
    if version == 0 or start >= settings.num_samples:
        if state.settled < version or not is_round_due(policy_version, version, settings):
            return None
        version, start = policy_version, 0
    return EvaluationChunk(
        policy_version=version,
        optimizer_step=version * settings.sync_every_steps,
        start=start,
        end=min(start + settings.chunk_size, settings.num_samples),
    )


def is_over(status: RunStatus, settings: EvaluationSettings) -> bool:
    """Say whether all steps of the run are trained: nothing that is asked for now would be."""
    return status.total("committed_steps") >= settings.max_steps


def has_room(
    status: RunStatus, *, pushed_at_last_chunk: int, num_workers: int, settings: EvaluationSettings
) -> bool:
    """Say whether a chunk may be asked for now without a place that training needs.

    Chunks under way hold one in WORKERS_A_CHUNK workers at most, one at least; while training has rollouts
    under way, it gets TRAINED_TO_EVALUATED for each of the last chunk first. A run that is over needs none.
    """
    if is_over(status, settings):
        return status.evaluation_outstanding < max(1, num_workers) * settings.chunk_size
    under_way = -(-status.evaluation_outstanding // settings.chunk_size)
    if under_way >= max(1, num_workers // WORKERS_A_CHUNK):
        return False
    written = status.total("pushed") - pushed_at_last_chunk
    return status.outstanding <= 0 or written >= TRAINED_TO_EVALUATED * settings.chunk_size
