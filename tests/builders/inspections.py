"""Builders of one inspected rollout over a vocabulary of readable pieces: valid by default."""

from __future__ import annotations

from typing import Any

import numpy as np

from broker_schemas.records.records import GroundTruthObject, ImageReference, MatchedSegment, SegmentRecord
from rollstream.show.inspect_view import InspectedObject, Inspection

FIRST_COORD_ID = 1000
PIECES = (
    "<|im_start|>",
    "<|image_pad|>",
    "list",
    '{"',
    "object",
    "_1",
    "desc",
    "WBC",
    "box",
    "}",
    ", ",
    "RBC",
)
END_ID = 12
PROMPT = [0, 1, 1, 1, 1, 1, 1, 2]
PREFIX = [3, 4, 5, 6, 7, 8, 1406, 1368, 1767, 1784, 9]
APPENDED = [10, 4, 6, 11, 8, 1010, 1020, 1300, 1400, 9, 9, END_ID]
TARGETS = (400, 370, 760, 780)


def token_text(token_id: int) -> str:
    """Return the text of an id: a coordinate token, the end token or one of PIECES."""
    if token_id >= FIRST_COORD_ID:
        return f"<|coord_{token_id - FIRST_COORD_ID}|>"
    return "<|im_end|>" if token_id == END_ID else PIECES[token_id]


def make_segment(**changes: Any) -> SegmentRecord:
    fields: dict[str, Any] = {
        "record_id": "r-17",
        "policy_version": 12,
        "sample_id": "BloodImage_00007",
        "task": "detect",
        "images": (ImageReference(path="images/7.jpg", width=640, height=480, grid_thw=(1, 4, 6)),),
        "processor_fingerprint": "fp",
        "assistant_payload": (
            GroundTruthObject(desc="WBC", geometry="bbox_2d", bins=TARGETS),
            GroundTruthObject(desc="RBC", geometry="bbox_2d", bins=(10, 20, 300, 400)),
        ),
        "prompt_token_ids": np.asarray(PROMPT, np.int32),
        "response_token_ids": np.asarray([*PREFIX, 9, END_ID], np.int32),
        "producer": "producer-1",
        "generation_ms": 840,
    }
    return SegmentRecord(**(fields | changes))


def make_matched(**changes: Any) -> MatchedSegment:
    token_ids = [*PROMPT, *PREFIX, *APPENDED]
    start = len(PROMPT) + len(PREFIX)
    desc_mask = np.zeros(len(token_ids), bool)
    desc_mask[start + 3] = True
    ce_mask = np.zeros(len(token_ids), bool)
    ce_mask[start:] = True
    ce_mask[[start + 3, *range(start + 5, start + 9)]] = False
    prefix_slots = [len(PROMPT) + offset for offset in (6, 7, 8, 9)]
    fields: dict[str, Any] = {
        "record_id": "r-17",
        "channel": "B",
        "policy_version": 12,
        "sample_id": "BloodImage_00007",
        "task": "detect",
        "images": make_segment().images,
        "processor_fingerprint": "fp",
        "token_ids": np.asarray(token_ids, np.int32),
        "prompt_length": len(PROMPT),
        "ce_mask": ce_mask,
        "desc_mask": desc_mask,
        "slot_positions": np.asarray([*prefix_slots, *range(start + 5, start + 9)], np.int32),
        "slot_targets": np.asarray([*TARGETS, 10, 20, 300, 400], np.int16),
        "slot_in_prefix": np.asarray([True] * 4 + [False] * 4),
    }
    matched = MatchedSegment(**(fields | changes))
    matched.check("built")
    return matched


def make_inspection(**changes: Any) -> Inspection:
    fields: dict[str, Any] = {
        "segment": make_segment(),
        "objects": (
            InspectedObject(
                number=1,
                desc="WBC",
                geometry="bbox_2d",
                bins=(406, 368, 767, 784),
                ground_truth_index=0,
                targets=TARGETS,
            ),
            InspectedObject(
                number=2, desc="Platelets", geometry="bbox_2d", bins=(5, 5, 4, 9), reason="bbox_invalid"
            ),
            InspectedObject(number=3, desc="RBC", geometry="bbox_2d", bins=(700, 20, 900, 200)),
        ),
        "matched": make_matched(),
        "dropped": {"bbox_invalid": 1},
    }
    return Inspection(**(fields | changes))
