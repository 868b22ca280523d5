"""What the learner's loop needs from outside, as protocols; the wiring hands it the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import ImageReference, MatchedSegment
from broker_schemas.records.run_status import RunStatus
from learner.collation import SegmentPixels

Evaluate = Callable[[Any, int], dict[str, float]]
"""(model, optimizer steps done) -> metrics, keys of ROLLOUT_MATCHING section 10; called on rank 0."""

ReadEvaluations = Callable[[int], Sequence[tuple[int, dict[str, float]]]]
"""(optimizer steps done at the last one that is known) -> later ones by others: (steps done, metrics)."""

FetchedPack = tuple[ReadyPack, list[MatchedSegment]]

SyncServers = Callable[[int, str], None]
"""(policy version, folder of its weights): returns when the rollout servers hold them; raises RunStopped."""


class LearnerBroker(Protocol):
    """The learner's door to the queue. Every rank has one; all of them call only what fetches."""

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        """Return the decision for the step, or None while it is open: ask again. An answer is final."""
        ...

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        """Return, for each rank, the packs of the open step that are ready before its claim, in its order."""
        ...

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        """Return the segments in the order asked."""
        ...

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        """Return what the claim of a coming step would give a rank now, but for its first packs.

        It moves and promises nothing; the claim may name other packs.
        """
        ...

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        """Take segments out of the claim of the step, for ever; repeatable."""
        ...

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, float | int | str]) -> None:
        """Record that the step was trained; repeatable."""
        ...

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        """Record that a checkpoint covers every step below ``optimizer_step``, the number of steps done."""
        ...

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        """Make a policy version current; repeatable."""
        ...

    def queue_status(self) -> RunStatus | None:
        """Return what the queue holds and has counted; None where there is no queue to look at."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class GroundTruthSource(Protocol):
    """Channel A: segments of ground-truth samples, a pure function of step and place."""

    @property
    def num_segments(self) -> int:
        """Segments of every A step over all ranks."""
        ...

    def load_items(
        self, optimizer_step: int, places: Sequence[int], policy_version: int
    ) -> list[tuple[MatchedSegment, SegmentPixels]]:
        """Return the segments at ``places`` of the step, in that order."""
        ...


class PixelSource(Protocol):
    """Opens the images that a rollout's segment names."""

    def load_pixels(self, images: Sequence[ImageReference]) -> SegmentPixels | None:
        """Return the pixels of ``images``, None for none."""
        ...
