"""Records that are valid by default; a test names only what it is about."""

from __future__ import annotations

from typing import Any

import numpy as np

from broker_schemas.records.packs import MatchedDescriptor
from broker_schemas.records.records import GroundTruthObject, ImageReference, MatchedSegment, SegmentRecord


def an_image(**changes: Any) -> ImageReference:
    return ImageReference(
        **{"path": "images/a.png", "width": 128, "height": 128, "grid_thw": (1, 8, 8), **changes}
    )


def an_object(**changes: Any) -> GroundTruthObject:
    return GroundTruthObject(**{"desc": "WBC", "geometry": "bbox_2d", "bins": (10, 20, 300, 400), **changes})


def a_rollout(record_id: str = "r-1.0", **changes: Any) -> SegmentRecord:
    fields: dict[str, Any] = {
        "record_id": record_id,
        "policy_version": 0,
        "sample_id": "train-1",
        "task": "bbox",
        "images": (an_image(),),
        "processor_fingerprint": "f00d",
        "assistant_payload": (an_object(),),
        "prompt_token_ids": np.arange(1, 9, dtype=np.int32),
        "response_token_ids": np.arange(20, 30, dtype=np.int32),
        "generated_at_ms": 1_000,
    }
    return SegmentRecord(**{**fields, **changes})


def a_segment(record_id: str = "r-1.0", num_tokens: int = 20, **changes: Any) -> MatchedSegment:
    ce_mask = np.zeros(num_tokens, dtype=np.bool_)
    ce_mask[-2:] = True
    fields: dict[str, Any] = {
        "record_id": record_id,
        "channel": "B",
        "policy_version": 0,
        "sample_id": "train-1",
        "task": "bbox",
        "images": (an_image(),),
        "processor_fingerprint": "f00d",
        "token_ids": np.arange(num_tokens, dtype=np.int32),
        "prompt_length": 8,
        "ce_mask": ce_mask,
        "desc_mask": np.zeros(num_tokens, dtype=np.bool_),
        "slot_positions": np.array([10, 11, 12, 13], dtype=np.int32),
        "slot_targets": np.array([1, 2, 3, 999], dtype=np.int16),
        "slot_in_prefix": np.array([True, True, False, False]),
        "counters": {"valid_objects": 1},
        "generated_at_ms": 1_000,
    }
    return MatchedSegment(**{**fields, **changes})


def a_descriptor(record_id: str = "r-1.0", **changes: Any) -> MatchedDescriptor:
    fields: dict[str, Any] = {
        "record_id": record_id,
        "policy_version": 0,
        "encoded_length": 20,
    }
    return MatchedDescriptor(**{**fields, **changes})
