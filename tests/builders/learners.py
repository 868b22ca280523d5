"""Builders for the learner's tests: a tiny Qwen3-VL without files, and segments that are valid by default.

Vocabulary of 1300 ids: 0..99 text, 100 image, 101 video, 102 vision start, 103 vision end, 200..1199 the
bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from broker_schemas.method.adapters import BaseModel
from broker_schemas.records.records import Channel, ImageReference, MatchedSegment
from learner.collation import CollationSettings, PackedRow, SegmentPixels
from learner.model_parts import AdapterSettings
from learner.packed_forward import hidden_row

IMAGE_TOKEN_ID = 100
VISION_START_ID, VISION_END_ID = 102, 103
FIRST_COORD_ID = 200
VOCABULARY_SIZE = 1300
COORD_IDS = tuple(range(FIRST_COORD_ID, FIRST_COORD_ID + 1000))
PATCH_SIZE = 8
PATCH_VALUES = 3 * 2 * PATCH_SIZE * PATCH_SIZE
COLLATION = CollationSettings(
    image_token_id=IMAGE_TOKEN_ID,
    merge_size=2,
    processor_fingerprint="test-processor",
    coord_ids=frozenset(COORD_IDS),
)


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """Return a random two-layer Qwen3-VL in evaluation-free mode; equal seeds give equal weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=101,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    return model.to(dtype).train()


def adapter_settings(**changes: Any) -> AdapterSettings:
    """Return small adapters on text, vision and mergers of the tiny model, coordinate rows beside them."""
    fields: dict[str, Any] = {
        "dropout": 0.0,
        "rank": 4,
        "alpha": 8.0,
        "targets": ("q_proj", "o_proj", "down_proj", "qkv", "linear_fc1"),
        "coordinate_ids": COORD_IDS,
        "is_dora": False,
        "base": BaseModel(path="/models/base", fingerprint="0123456789abcdef"),
    }
    return AdapterSettings(**{**fields, **changes})


def make_segment(
    record_id: str = "r-0",
    *,
    seed: int = 0,
    channel: Channel = "B",
    num_text: int = 9,
    num_slots: int = 4,
    num_prefix_slots: int = 2,
    grid_thw: tuple[int, int, int] | None = (1, 4, 4),
    counters: dict[str, int] | None = None,
    **changes: Any,
) -> MatchedSegment:
    """Return a segment of a short prompt with one image (None: no image), slots, then supervised text."""
    rng = np.random.default_rng(seed)
    num_image = 0 if grid_thw is None else int(np.prod(grid_thw)) // 4
    image = [VISION_START_ID, *[IMAGE_TOKEN_ID] * num_image, VISION_END_ID] if num_image else []
    prompt = [*rng.integers(1, 90, 3), *image, *rng.integers(1, 90, 4)]
    coords = rng.integers(FIRST_COORD_ID, FIRST_COORD_ID + 1000, num_slots)
    answer = [*coords, *rng.integers(1, 90, num_text)]
    token_ids = np.asarray([*prompt, *answer], np.int32)
    ce_mask = np.zeros(len(token_ids), bool)
    ce_mask[len(prompt) + num_slots :] = True
    desc_mask = np.zeros(len(token_ids), bool)
    desc_mask[-min(2, num_text) :] = num_text > 0
    fields: dict[str, Any] = {
        "record_id": record_id,
        "channel": channel,
        "policy_version": 0,
        "sample_id": f"sample-{record_id}",
        "task": "test",
        "images": ()
        if grid_thw is None
        else (ImageReference(path=f"{record_id}.png", width=32, height=32, grid_thw=grid_thw),),
        "processor_fingerprint": COLLATION.processor_fingerprint,
        "token_ids": token_ids,
        "prompt_length": len(prompt),
        "ce_mask": ce_mask,
        "desc_mask": desc_mask,
        "slot_positions": np.arange(len(prompt), len(prompt) + num_slots, dtype=np.int32),
        "slot_targets": rng.integers(0, 1000, num_slots).astype(np.int16),
        "slot_in_prefix": np.arange(num_slots) < num_prefix_slots,
        "counters": {"matched": 1} if counters is None else counters,
    }
    segment = MatchedSegment(**{**fields, **changes})
    segment.check(record_id)
    return segment


def make_pixels(segment: MatchedSegment, *, dtype: torch.dtype = torch.float32) -> SegmentPixels | None:
    """Return random patches for the segment's images, the same for the same record id."""
    if not segment.images:
        return None
    grids = torch.tensor([image.grid_thw for image in segment.images])
    generator = torch.Generator().manual_seed(sum(segment.record_id.encode()))
    patches = torch.randn(int(grids.prod(1).sum()), PATCH_VALUES, generator=generator, dtype=torch.float64)
    return SegmentPixels(patches=patches.to(dtype), grids_thw=grids)


def forward_row(model: Any, row: PackedRow) -> torch.Tensor:
    """Return the logits (P, V) of the row's kept positions."""
    return torch.as_tensor(model.get_output_embeddings()(hidden_row(model, row)))
