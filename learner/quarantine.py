"""Takes segments that cannot be trained out of a step, on all ranks alike [Q-13].

A step without them is trained anew from its first row, so that it is what a resume or a replay trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from broker_schemas.errors import DataError, NonFiniteLoss, RunStopped
from broker_schemas.records.packs import StepClaim, Untrainable
from broker_schemas.records.reasons import QuarantineReason
from broker_schemas.records.records import MatchedSegment
from learner.collation import CollationSettings, SegmentPixels, check_segment
from learner.losses import SegmentLosses
from learner.ports import LearnerBroker, PixelSource

LONGEST_DETAIL: Final = 500


def load_trainable(
    segments: Sequence[MatchedSegment], source: PixelSource, settings: CollationSettings
) -> tuple[list[SegmentPixels | None], list[Untrainable]]:
    """Return the pixels of ``segments``, and those segments that cannot be trained; one is empty."""
    pixels, broken = list[SegmentPixels | None](), list[Untrainable]()
    for segment in segments:
        reason: QuarantineReason = "quarantined_image"
        try:
            found = source.load_pixels(segment.images)
            reason = "quarantined_segment"
            check_segment(segment, found, settings)
            pixels.append(found)
        except DataError as exc:
            detail = str(exc)[:LONGEST_DETAIL]
            broken.append(Untrainable(record_id=segment.record_id, reason=reason, detail=detail))
    return ([], broken) if broken else (pixels, broken)


def without_a_number(losses: SegmentLosses) -> list[Untrainable]:
    """Return the segments of a row whose loss is not finite."""
    finite = torch.isfinite(losses.total.detach()).tolist()
    return [
        Untrainable(record_id=name, reason="quarantined_loss", detail="its loss is not finite")
        for name, is_number in zip(losses.record_ids, finite, strict=True)
        if not is_number
    ]


def take_out(
    claim: StepClaim,
    found: Sequence[Untrainable],
    *,
    broker: LearnerBroker,
    is_first: bool,
    weights: Iterable[Tensor],
) -> StepClaim:
    """Return the claim without ``found``, the same on all ranks; rank 0 tells the broker before.

    Raises RunStopped where more than one segment is left and none of them can be trained, for then it is not
    a segment's fault, and NonFiniteLoss where the weights are no numbers or no rollout is to blame.
    """
    names = ", ".join(item.record_id for item in found[:3])
    what = f"optimizer step {claim.optimizer_step}: {len(found)} segments, first {names}"
    is_loss = any(item.reason == "quarantined_loss" for item in found)
    if claim.kind == "A" or (is_loss and not all(bool(torch.isfinite(w).all()) for w in weights)):
        raise NonFiniteLoss(
            f"{what}: got a loss that is not finite, expected a number; lower the learning rate or look at "
            "the sample with `rollstream data show`"
        )
    if len(found) == claim.num_segments > 1:
        raise RunStopped(
            f"{what}: none of the step can be trained: {found[0].detail}; see that data root, model and "
            "learning rate are right, or take them out with `rollstream quarantine`"
        )
    if is_first:
        broker.quarantine(optimizer_step=claim.optimizer_step, segments=found)
    return claim.without({item.record_id for item in found})
