"""Fakes of the learner's ports: pure functions of step, place and id, the same for any rank and restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import ImageReference, MatchedSegment
from broker_schemas.records.run_status import RunStatus
from learner.collation import SegmentPixels
from learner.ports import FetchedPack
from tests.builders.learners import make_pixels, make_segment

PACKS_IN_STEP = 2
SEGMENTS_IN_PACK = 3


def rollout_segment(record_id: str, policy_version: int = 0) -> MatchedSegment:
    """Return the segment that ``record_id`` always names."""
    seed = sum((index + 1) * code for index, code in enumerate(record_id.encode()))
    return make_segment(
        record_id,
        seed=seed,
        num_text=3 + seed % 7,
        policy_version=policy_version,
        counters={"matched": 2, "dropped_wrong_arity": 1},
    )


def step_packs(optimizer_step: int) -> list[ReadyPack]:
    """Return the packs of a B step over all ranks, the same for every world size."""
    packs = []
    for index in range(PACKS_IN_STEP):
        names = tuple(f"s{optimizer_step}-p{index}-r{number}" for number in range(SEGMENTS_IN_PACK))
        lengths = tuple(rollout_segment(name).encoded_length for name in names)
        packs.append(
            ReadyPack(
                pack_id=f"s{optimizer_step}-p{index}",
                record_ids=names,
                lengths=lengths,
                policy_version=0,
                fill=sum(lengths) / 128,
            )
        )
    return packs


class FakeBroker:
    """Claims what the schedule says; keeps what it was told in ``told`` and, if given, in a JSONL file."""

    def __init__(
        self,
        world_size: int,
        *,
        path: Path | None = None,
        on_commit: Callable[[int], None] = lambda optimizer_step: None,
        answers_after: int = 0,
        change_segment: Callable[[MatchedSegment], MatchedSegment] = lambda segment: segment,
    ) -> None:
        self._world_size = world_size
        self._path = path
        self._on_commit = on_commit
        self._answers_after = answers_after
        self._change_segment = change_segment
        self.num_asked = 0
        self.status: RunStatus | None = None
        self.told: list[tuple[str, int]] = []
        self.quarantined: list[Untrainable] = []

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        self.num_asked += 1
        if self.num_asked <= self._answers_after:
            return None
        if scheduled_kind == "A":
            return StepClaim(
                optimizer_step=optimizer_step, kind="A", reason="schedule", policy_version=policy_version
            )
        packs = step_packs(optimizer_step)
        share = len(packs) // self._world_size
        return StepClaim(
            optimizer_step=optimizer_step,
            kind="B",
            reason="claimed",
            policy_version=policy_version,
            packs=tuple(tuple(packs[rank * share : (rank + 1) * share]) for rank in range(self._world_size)),
        )

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        """There are none."""
        return ()

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        return [self._change_segment(rollout_segment(name)) for name in record_ids]

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        """There are none."""
        return ()

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        self._tell("quarantine", optimizer_step)
        self.quarantined += segments

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, float | int | str]) -> None:
        self._tell("commit", optimizer_step)
        self._on_commit(optimizer_step)

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        self._tell("settle", optimizer_step)

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        self._tell("publish", policy_version)

    def queue_status(self) -> RunStatus | None:
        return self.status

    def close(self) -> None:
        self._tell("close", 0)

    def _tell(self, what: str, number: int) -> None:
        self.told.append((what, number))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([what, number]) + "\n")


class FakeGroundTruth:
    """Four segments an A step."""

    num_segments = 4

    def load_items(
        self, optimizer_step: int, places: Sequence[int], policy_version: int
    ) -> list[tuple[MatchedSegment, SegmentPixels]]:
        items = []
        for place in places:
            segment = make_segment(
                f"A-{optimizer_step}-{place}",
                seed=1000 + 10 * optimizer_step + place,
                channel="A",
                num_text=4 + place,
                policy_version=policy_version,
                counters={},
                slot_in_prefix=np.zeros(4, bool),
            )
            pixels = make_pixels(segment)
            assert pixels is not None
            items.append((segment, pixels))
        return items


class FakePixels:
    """Opens the images of ``make_segment`` by their path."""

    def load_pixels(self, images: Sequence[ImageReference]) -> SegmentPixels | None:
        if not images:
            return None
        return make_pixels(make_segment(images[0].path.removesuffix(".png"), grid_thw=images[0].grid_thw))
