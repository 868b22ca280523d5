"""Rows of invented segments for measuring: the shapes of real ones, random tokens and pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from broker_schemas.records.records import ImageReference, MatchedSegment
from learner.collation import CollationSettings, PackedRow, PositionRule, SegmentPixels, collate_row

FINGERPRINT = "practice"


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """A row of ``num_segments`` segments: each ``image_tokens`` of one image, ``prompt_tokens`` of text, then
    ``slots`` coordinates and ``text_tokens`` that are supervised.
    """

    num_segments: int
    image_grid: tuple[int, int]
    prompt_tokens: int = 40
    slots: int = 40
    text_tokens: int = 60

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1] // 4

    @property
    def segment_tokens(self) -> int:
        return self.image_tokens + 2 + self.prompt_tokens + self.slots + self.text_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_segments * self.segment_tokens

    @property
    def num_patches(self) -> int:
        return self.num_segments * self.image_grid[0] * self.image_grid[1]

    @property
    def num_supervised(self) -> int:
        return self.num_segments * (self.slots + self.text_tokens)


def practice_row(
    shape: RowShape, config: Any, first_coordinate_id: int, positions_of: PositionRule, *, seed: int = 0
) -> PackedRow:
    """Return a packed row of ``shape`` for a model of ``config``; equal arguments give an equal row."""
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    settings = CollationSettings(
        image_token_id=config.image_token_id,
        merge_size=vision.spatial_merge_size,
        processor_fingerprint=FINGERPRINT,
        coord_ids=frozenset(range(first_coordinate_id, first_coordinate_id + 1000)),
    )
    segments = [_segment(shape, config, first_coordinate_id, rng, name) for name in range(shape.num_segments)]
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    rows, columns = shape.image_grid
    pixels = [
        SegmentPixels(
            patches=torch.from_numpy(rng.standard_normal((rows * columns, values)).astype(np.float32)),
            grids_thw=torch.tensor([[1, rows, columns]]),
        )
        for _ in segments
    ]
    return collate_row(segments, pixels, settings, positions_of)


def _segment(
    shape: RowShape, config: Any, first_coordinate_id: int, rng: np.random.Generator, name: int
) -> MatchedSegment:
    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, 400, count)]

    image = [config.vision_start_token_id, *[config.image_token_id] * shape.image_tokens]
    prompt = [*image, config.vision_end_token_id, *words(shape.prompt_tokens)]
    slots = [first_coordinate_id + int(place) for place in rng.integers(0, 1000, shape.slots)]
    token_ids = np.asarray([*prompt, *slots, *words(shape.text_tokens)], np.int32)
    ce_mask = np.zeros(len(token_ids), bool)
    ce_mask[len(prompt) + shape.slots :] = True
    rows, columns = shape.image_grid
    return MatchedSegment(
        record_id=f"practice-{name}",
        channel="B",
        policy_version=0,
        sample_id=f"practice-{name}",
        task="practice",
        images=(ImageReference(path=f"{name}.png", width=32, height=32, grid_thw=(1, rows, columns)),),
        processor_fingerprint=FINGERPRINT,
        token_ids=token_ids,
        prompt_length=len(prompt),
        ce_mask=ce_mask,
        desc_mask=np.zeros(len(token_ids), bool),
        slot_positions=np.arange(len(prompt), len(prompt) + shape.slots, dtype=np.int32),
        slot_targets=rng.integers(0, 1000, shape.slots).astype(np.int16),
        slot_in_prefix=np.arange(shape.slots) % 2 == 0,
        counters={"matched": 1},
    )
