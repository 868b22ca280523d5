"""What one evaluation rollout counts for: its objects, the ground truth and how they met.

Owns the values and their plain map; metrics over many results are computed where they are collected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import MalformedRecord
from broker_schemas.records.body_fields import BodyReader
from broker_schemas.records.records import (
    MAX_ID_CHARS,
    NOT_STEP_BOUND,
    GroundTruthObject,
    ImageReference,
    SegmentRecord,
)
from consumers.matching import MatchResult, MatchSettings
from consumers.overlap_counts import OverlapCounts, count_overlaps
from consumers.parsing import ParsedObject, ParsedRollout

MAX_ROLLOUT_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPrediction:
    """A valid predicted object: ``shape`` in bins, ``logprob_score`` in [0, 1].

    The latter is exp of the mean log-probability of its coordinate tokens, None where the rollout has none.
    """

    shape: GroundTruthObject
    logprob_score: float | None = None

    def to_body(self) -> dict[str, Any]:
        return {**self.shape.to_body(), "logprob_score": self.logprob_score}

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str) -> ScoredPrediction:
        score = body.get("logprob_score")
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (is_number and 0 <= float(str(score)) <= 1):
            raise MalformedRecord(f"{where}.logprob_score: got {score!r}, expected a number from 0 to 1")
        return cls(
            shape=GroundTruthObject.from_body(body, where),
            logprob_score=None if score is None else float(score),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One greedy rollout on a validation image (section 10).

    ``num_matched`` is that of the class-agnostic match at the gate, ``overlaps`` holds the other counts.
    ``dropped`` maps a reason to invalid objects, which are no predictions.
    """

    record_id: str
    sample_id: str
    policy_version: int
    optimizer_step: int = NOT_STEP_BOUND
    image: ImageReference
    predictions: tuple[ScoredPrediction, ...]
    ground_truth: tuple[GroundTruthObject, ...]
    num_matched: int
    overlaps: OverlapCounts = field(default_factory=OverlapCounts)
    truncated: bool
    is_invalid_rollout: bool
    dropped: Mapping[str, int]
    rollout_text: str

    def to_body(self) -> dict[str, Any]:
        """Return a map of plain values: msgpack and JSON can write it."""
        return {
            "record_id": self.record_id,
            "sample_id": self.sample_id,
            "policy_version": self.policy_version,
            "optimizer_step": self.optimizer_step,
            "image": self.image.to_body(),
            "predictions": [item.to_body() for item in self.predictions],
            "ground_truth": [item.to_body() for item in self.ground_truth],
            "num_matched": self.num_matched,
            "overlaps": self.overlaps.to_body(),
            "truncated": int(self.truncated),
            "is_invalid_rollout": int(self.is_invalid_rollout),
            "dropped": dict(self.dropped),
            "rollout_text": self.rollout_text,
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str = "evaluation result") -> EvaluationResult:
        """Return the result in ``body``; raises MalformedRecord that names field and value."""
        read = BodyReader(body, where)
        predictions = read.items("predictions", ScoredPrediction.from_body)
        ground_truth = read.items("ground_truth", GroundTruthObject.from_body)
        image, overlaps = body.get("image"), body.get("overlaps")
        most_pairs = min(len(predictions), len(ground_truth))
        return cls(
            record_id=read.text("record_id", max_chars=MAX_ID_CHARS),
            sample_id=read.text("sample_id", max_chars=MAX_ID_CHARS),
            policy_version=read.integer("policy_version", low=0),
            optimizer_step=read.integer("optimizer_step", low=NOT_STEP_BOUND),
            image=ImageReference.from_body(image if isinstance(image, dict) else {}, f"{where}.image"),
            predictions=predictions,
            ground_truth=ground_truth,
            num_matched=read.integer("num_matched", low=0, high=most_pairs),
            overlaps=OverlapCounts.from_body(
                overlaps if isinstance(overlaps, dict) else {}, f"{where}.overlaps", at_most=most_pairs
            ),
            truncated=bool(read.integer("truncated", low=0, high=1)),
            is_invalid_rollout=bool(read.integer("is_invalid_rollout", low=0, high=1)),
            dropped=read.counts("dropped"),
            rollout_text=read.text("rollout_text", empty_allowed=True, max_chars=MAX_ROLLOUT_CHARS),
        )


def evaluate_rollout(
    record: SegmentRecord,
    parsed: ParsedRollout,
    match: MatchResult,
    rollout_text: str,
    settings: MatchSettings,
) -> EvaluationResult:
    """Return what the rollout of ``record`` counts for; ``record`` must name its image."""
    predictions = tuple(_scored(item, record.response_logprobs) for item in parsed.objects)
    return EvaluationResult(
        record_id=record.record_id,
        sample_id=record.sample_id,
        policy_version=record.policy_version,
        optimizer_step=record.optimizer_step,
        image=record.images[0],
        predictions=predictions,
        ground_truth=record.assistant_payload,
        num_matched=len(match.pairs),
        overlaps=count_overlaps(
            [item.shape for item in predictions], record.assistant_payload, match, settings
        ),
        truncated=parsed.truncated,
        is_invalid_rollout=parsed.is_invalid_rollout,
        dropped=dict(parsed.dropped),
        rollout_text=rollout_text[:MAX_ROLLOUT_CHARS],
    )


def unusable_rollout(record: SegmentRecord) -> EvaluationResult:
    """Return what a rollout that cannot be read counts for: all of its image's objects are missed."""
    return EvaluationResult(
        record_id=record.record_id,
        sample_id=record.sample_id,
        policy_version=record.policy_version,
        optimizer_step=record.optimizer_step,
        image=record.images[0],
        predictions=(),
        ground_truth=record.assistant_payload,
        num_matched=0,
        truncated=record.finish_reason == "length",
        is_invalid_rollout=True,
        dropped={},
        rollout_text="",
    )


def _scored(item: ParsedObject, logprobs: NDArray[np.float32]) -> ScoredPrediction:
    score = None
    if len(logprobs):
        # Captured tokens are the rollout's own: the same index reads their log-probabilities.
        mean = float(np.mean(logprobs[list(item.token_indices)], dtype=np.float64))
        score = min(math.exp(min(mean, 0.0)), 1.0)
    shape = GroundTruthObject(desc=item.desc, geometry=item.geometry, bins=item.bins)
    return ScoredPrediction(shape=shape, logprob_score=score)
