"""The learner's port without a queue: every step is an A step, as in the warm start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import MatchedSegment
from learner.ports import FetchedPack


class GroundTruthOnlyBroker:
    """Answers every claim with A, keeps nothing; raises RunStopped where the schedule asks for rollouts."""

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim:
        if scheduled_kind == "B":
            raise RunStopped(
                f"optimizer step {optimizer_step}: the schedule asks for rollouts but this run has no queue; "
                "set b_ratio to 0 or start the whole stack with `rollstream up`"
            )
        return StepClaim(
            optimizer_step=optimizer_step, kind="A", reason="schedule", policy_version=policy_version
        )

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        """There are none: no step has rollouts."""
        return ()

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        if record_ids:
            raise RunStopped(f"segments {list(record_ids)[:3]}: got a request without a queue to fetch from")
        return []

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        """There are none."""
        return ()

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        raise RunStopped(
            f"optimizer step {optimizer_step}: got rollouts to take out in a run without a queue"
        )

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, float | int | str]) -> None:
        """Do nothing: there is no queue to tell."""

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        """Do nothing: no claim waits for a checkpoint."""

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        """Do nothing: nobody follows the weights."""

    def queue_status(self) -> None:
        """There is no queue."""

    def close(self) -> None:
        """Do nothing: no connection is held."""
