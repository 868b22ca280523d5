"""What a replay trains: the archived claims of a run as the learner's port, and the packs of an experiment.

Pure but for the archive it reads; it must not know torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from broker_schemas.errors import DataError, RunStopped
from broker_schemas.records.ledger import Ledger, StepHistory
from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import MatchedSegment
from consumers.packing import SelectionMethod, select_pack
from learner.ports import FetchedPack
from rollstream.history.archive_reading import PayloadIndex, read_archived_events


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Optimizer steps ``first`` to ``end``, without ``end``."""

    first: int
    end: int


def archived_ledger(archive: Path) -> Ledger:
    """Return the fold of an archived log; raises DataError for an archive without a single step."""
    ledger = Ledger().apply(read_archived_events(archive))
    if not ledger.committed:
        raise DataError(
            f"archive {archive}: holds no committed optimizer step, so there is nothing to replay"
        )
    return ledger


def step_range(ledger: Ledger, first: int | None, end: int | None) -> StepRange:
    """Return the steps to replay, by default all that were trained; raises DataError outside the log."""
    last = 0
    while last in ledger.committed:
        last += 1
    start, stop = first or 0, last if end is None else end
    if not 0 <= start < stop <= last:
        raise DataError(
            f"replay: got optimizer steps {start} to {stop}, expected a range within 0 to {last}, "
            "the steps that the archive holds"
        )
    return StepRange(first=start, end=stop)


def archived_claim(ledger: Ledger, step: StepHistory, *, world_size: int, capacity: int) -> StepClaim:
    """Return the claim of a step as the learner was given it: packs of each rank in micro-step order."""
    packs: list[list[ReadyPack]] = [[] for _ in range(world_size)]
    for rank, pack_id, policy_version, ids in step.packs:
        if rank >= world_size:
            raise DataError(
                f"optimizer step {step.optimizer_step}: got a pack of rank {rank}, expected less than "
                f"{world_size} ranks; replay with the learner_world_size of the run"
            )
        lengths = tuple(ledger.rollouts[name].encoded_length for name in ids)
        packs[rank].append(
            ReadyPack(
                pack_id=pack_id,
                record_ids=ids,
                lengths=lengths,
                policy_version=policy_version,
                fill=sum(lengths) / capacity,
            )
        )
    return StepClaim(
        optimizer_step=step.optimizer_step,
        kind=step.kind,
        reason=step.reason,
        policy_version=step.policy_version,
        packs=tuple(map(tuple, packs)) if step.kind == "B" else (),
        short_ranks=step.short_ranks,
    )


def repack(claim: StepClaim, method: SelectionMethod, capacity: int) -> StepClaim:
    """Return the claim with the same segments in other packs: selected by ``method``, to the ranks in turn.

    An A step stays as it is. Raises BinpackingMissing.
    """
    waiting = [
        (name, length, pack.policy_version)
        for packs in claim.packs
        for pack in packs
        for name, length in zip(pack.record_ids, pack.lengths, strict=True)
    ]
    ranks: list[list[ReadyPack]] = [[] for _ in claim.packs]
    num_packs = 0
    while waiting:
        chosen = select_pack([length for _, length, _ in waiting], capacity, method)
        members = [waiting[index] for index in chosen]
        waiting = [item for index, item in enumerate(waiting) if index not in set(chosen)]
        total = sum(length for _, length, _ in members)
        ranks[num_packs % len(ranks)].append(
            ReadyPack(
                pack_id=f"replay-{claim.optimizer_step}-{num_packs}",
                record_ids=tuple(name for name, _, _ in members),
                lengths=tuple(length for _, length, _ in members),
                policy_version=min(version for _, _, version in members),
                fill=total / capacity,
            )
        )
        num_packs += 1
    return replace(claim, packs=tuple(map(tuple, ranks)))


class ArchivedClaims:
    """The learner's port over an archive: claims and payloads as they were, nothing is told to anyone."""

    def __init__(
        self,
        archive: Path,
        *,
        world_size: int,
        capacity: int,
        packing_selector: SelectionMethod | None = None,
    ) -> None:
        self._ledger = archived_ledger(archive)
        self._payloads = PayloadIndex(archive)
        self._world_size = world_size
        self._capacity = capacity
        self._selector = packing_selector

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim:
        """Return the archived decision, whatever the schedule says now; raises RunStopped without one."""
        step = self._ledger.steps.get(optimizer_step)
        if step is None:
            raise RunStopped(f"optimizer step {optimizer_step}: not in the archive; replay fewer steps")
        claim = archived_claim(self._ledger, step, world_size=self._world_size, capacity=self._capacity)
        return claim if self._selector is None else repack(claim, self._selector, self._capacity)

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        """There are none: every decision is in the archive."""
        return ()

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        """Return archived payloads; raises DataError for one that is missing."""
        return self._payloads.fetch(record_ids)

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        """There are none: an archive is read when it is asked."""
        return ()

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        """Raise RunStopped: what was trained then must be trained now."""
        raise RunStopped(
            f"optimizer step {optimizer_step}: segment {segments[0].record_id} was trained in the run and "
            f"cannot be any more: {segments[0].detail}; bring it back, or replay the steps before"
        )

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, Any]) -> None:
        """Do nothing: the step was committed when it was first trained."""

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        """Do nothing: an archive frees nothing."""

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        """Do nothing: nobody follows a replay."""

    def queue_status(self) -> None:
        """There is no queue: what it held then is in the log of then."""

    def close(self) -> None:
        """Do nothing: no connection is held."""
