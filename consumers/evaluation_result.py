"""What one evaluation rollout counts for: its objects, the ground truth and how they met.

Owns the values and their plain map; metrics over many results are computed where they are collected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from consumers.matching import MatchResult
from consumers.parsing import ParsedObject, ParsedRollout

CONSTANT_SCORE = 1.0
MAX_ROLLOUT_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPrediction:
    """A valid predicted object: ``shape`` in bins, a constant ``score``, ``logprob_score`` in [0, 1].

    The latter is exp of the mean log-probability of its coordinate tokens, None where the rollout has none.
    """

    shape: GroundTruthObject
    score: float = CONSTANT_SCORE
    logprob_score: float | None = None

    def to_body(self) -> dict[str, Any]:
        return {**self.shape.to_body(), "score": self.score, "logprob_score": self.logprob_score}

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str) -> ScoredPrediction:
        score, from_logprobs = body.get("score"), body.get("logprob_score")
        for name, value in (("score", score), ("logprob_score", from_logprobs)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 <= float(str(value)) <= 1) and (name == "score" or value is not None):
                raise MalformedRecord(f"{where}.{name}: got {value!r}, expected a number from 0 to 1")
        return cls(
            shape=GroundTruthObject.from_body(body, where),
            score=float(str(score)),
            logprob_score=None if from_logprobs is None else float(from_logprobs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One greedy rollout on a validation image (section 10).

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
        image = body.get("image")
        return cls(
            record_id=read.text("record_id", max_chars=MAX_ID_CHARS),
            sample_id=read.text("sample_id", max_chars=MAX_ID_CHARS),
            policy_version=read.integer("policy_version", low=0),
            optimizer_step=read.integer("optimizer_step", low=NOT_STEP_BOUND),
            image=ImageReference.from_body(image if isinstance(image, dict) else {}, f"{where}.image"),
            predictions=predictions,
            ground_truth=ground_truth,
            num_matched=read.integer("num_matched", low=0, high=min(len(predictions), len(ground_truth))),
            truncated=bool(read.integer("truncated", low=0, high=1)),
            is_invalid_rollout=bool(read.integer("is_invalid_rollout", low=0, high=1)),
            dropped=read.counts("dropped"),
            rollout_text=read.text("rollout_text", empty_allowed=True, max_chars=MAX_ROLLOUT_CHARS),
        )


def evaluate_rollout(
    record: SegmentRecord, parsed: ParsedRollout, match: MatchResult, rollout_text: str
) -> EvaluationResult:
    """Return what the rollout of ``record`` counts for; ``record`` must name its image."""
    return EvaluationResult(
        record_id=record.record_id,
        sample_id=record.sample_id,
        policy_version=record.policy_version,
        optimizer_step=record.optimizer_step,
        image=record.images[0],
        predictions=tuple(_scored(item, record.response_logprobs) for item in parsed.objects),
        ground_truth=record.assistant_payload,
        num_matched=len(match.pairs),
        truncated=parsed.truncated,
        is_invalid_rollout=parsed.is_invalid_rollout,
        dropped=dict(parsed.dropped),
        rollout_text=rollout_text[:MAX_ROLLOUT_CHARS],
    )


def _scored(item: ParsedObject, logprobs: NDArray[np.float32]) -> ScoredPrediction:
    score = None
    if len(logprobs):
        # Captured tokens are the rollout's own: the same index reads their log-probabilities.
        mean = float(np.mean(logprobs[list(item.token_indices)], dtype=np.float64))
        score = min(math.exp(min(mean, 0.0)), 1.0)
    shape = GroundTruthObject(desc=item.desc, geometry=item.geometry, bins=item.bins)
    return ScoredPrediction(shape=shape, logprob_score=score)
