"""Rollout records that are valid by default, for the tests of segments, outcomes and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject, ImageReference, SegmentRecord
from consumers.record_matching import MatcherTools
from tests.builders.settings import method_settings
from tests.builders.tokenizers import encode, make_box, plain_tokenizer

IMAGE = ImageReference(path="images/1.png", width=640, height=480, grid_thw=(1, 16, 12))
NUM_IMAGE_TOKENS = 48


def make_rollout(
    truth: Sequence[GroundTruthObject] | None = None,
    *,
    response: str | None = None,
    tokenizer: Tokenizer | None = None,
    **others: Any,
) -> SegmentRecord:
    """Return a record whose response repeats its ground truth, unless ``response`` says otherwise."""
    chosen = tokenizer or plain_tokenizer()
    payload = tuple([make_box()] if truth is None else truth)
    text = render_payload(payload).text + "<|im_end|>" if response is None else response
    fields: dict[str, Any] = {
        "record_id": "r-1",
        "policy_version": 3,
        "sample_id": "s-1",
        "task": "detect",
        "images": (IMAGE,),
        "processor_fingerprint": "p",
        "assistant_payload": payload,
        "prompt_token_ids": make_prompt(chosen),
        "response_token_ids": np.asarray(encode(chosen, text), dtype=np.int32),
        "generated_at_ms": 7,
    }
    return SegmentRecord(**{**fields, **others})


def make_prompt(tokenizer: Tokenizer) -> Any:
    """Return the ids of an instruction behind the tokens of one image."""
    image = [tokenizer.token_to_id("<|image_pad|>") or 0] * NUM_IMAGE_TOKENS
    return np.asarray([*image, *encode(tokenizer, "list every object")], dtype=np.int32)


@cache
def make_tools(capacity: int = 4096) -> MatcherTools:
    """Return what the records above are matched with."""
    tokenizer = plain_tokenizer()
    pixels = frozenset({tokenizer.token_to_id("<|image_pad|>") or 0})
    return MatcherTools.for_tokenizer(
        tokenizer, capacity=capacity, image_token_ids=pixels, **method_settings()
    )
