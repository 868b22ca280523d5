"""From segments to one packed row: token ids, the four position rows and pixels, checked against each other.

Pure: it is handed the pixels and the model's own position rule; it opens no file and runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from broker_schemas.errors import DataError
from broker_schemas.records.records import MatchedSegment
from learner.supervision import RowSupervision, on_device, supervise_row

PositionRule = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input_ids (1, L), is_image_token (1, L) int32, image_grid_thw (n, 3) or None) -> positions (3, 1, L)."""


@dataclass(frozen=True, kw_only=True)
class CollationSettings:
    """What the model fixes about a row.

    ``image_token_id``: the placeholder that stands for one merged patch. ``merge_size``: patches per side
    of one placeholder. ``processor_fingerprint``: of the processor the learner uses; segments made with
    another are refused. ``coord_ids``: token ids of the 1000 bins. ``with_repeats``: supervise the tokens of
    repeated objects too.
    """

    image_token_id: int
    merge_size: int
    processor_fingerprint: str
    coord_ids: frozenset[int]
    with_repeats: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentPixels:
    """Pixels of one segment's images: ``patches`` (sum of grid
    products, patch size) float32, ``grids_thw`` (n, 3).
    """

    patches: Tensor
    grids_thw: Tensor


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """One packed row of T tokens and N segments.

    ``input_ids`` (1, T) int64; ``position_ids`` (4, 1, T): text positions from 0 in each segment, then the
    three multimodal rows; ``pixel_values`` (patches, patch size) and ``image_grid_thw`` (n, 3), None
    without images; ``kept_positions`` (P,) are the only positions whose logits are needed, and
    ``supervision`` indexes them.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    kept_positions: Tensor
    supervision: RowSupervision

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_patches(self) -> int:
        return 0 if self.pixel_values is None else int(self.pixel_values.shape[0])

    def to(self, device: torch.device) -> PackedRow:
        """Return the row on ``device``."""
        return PackedRow(
            input_ids=on_device(self.input_ids, device),
            position_ids=on_device(self.position_ids, device),
            pixel_values=None if self.pixel_values is None else on_device(self.pixel_values, device),
            image_grid_thw=None if self.image_grid_thw is None else on_device(self.image_grid_thw, device),
            kept_positions=on_device(self.kept_positions, device),
            supervision=self.supervision.to(device),
        )


def collate_row(
    segments: Sequence[MatchedSegment],
    pixels: Sequence[SegmentPixels | None],
    settings: CollationSettings,
    positions_of: PositionRule,
) -> PackedRow:
    """Return the row of ``segments`` in the order given; ``pixels`` has one entry each, None without images.

    Raises DataError naming the segment whose parts disagree [M-11], ValueError for no segments.
    """
    if not segments:
        raise ValueError("packed row: got no segments, expected at least one")
    for segment, segment_pixels in zip(segments, pixels, strict=True):
        check_segment(segment, segment_pixels, settings)
    supervision = supervise_row(segments, with_repeats=settings.with_repeats)
    kept_positions, kept_supervision = supervision.on_kept_rows()
    with_images = [entry for entry in pixels if entry is not None]
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate([s.token_ids for s in segments]).astype(np.int64))[None],
        position_ids=torch.cat(
            [
                _segment_positions(segment, entry, settings, positions_of)
                for segment, entry in zip(segments, pixels, strict=True)
            ],
            dim=2,
        ),
        pixel_values=torch.cat([entry.patches for entry in with_images]) if with_images else None,
        image_grid_thw=torch.cat([entry.grids_thw for entry in with_images]) if with_images else None,
        kept_positions=kept_positions,
        supervision=kept_supervision,
    )


def check_segment(segment: MatchedSegment, pixels: SegmentPixels | None, settings: CollationSettings) -> None:
    """Raise DataError where processor, image tokens, grids and supervised tokens disagree [M-11]."""
    where = f"segment {segment.record_id} (sample {segment.sample_id})"
    if segment.processor_fingerprint != settings.processor_fingerprint:
        raise DataError(
            f"{where}: got processor fingerprint {segment.processor_fingerprint!r}, expected "
            f"{settings.processor_fingerprint!r}; producer and learner must use the same processor files"
        )
    grids = [] if pixels is None else [tuple(int(n) for n in grid) for grid in pixels.grids_thw]
    if grids != [tuple(image.grid_thw) for image in segment.images]:
        raise DataError(
            f"{where}: got image grids {grids} from the learner's processor, expected "
            f"{[image.grid_thw for image in segment.images]} as the producer cut them; the image bounds "
            "differ"
        )
    num_expected = sum(t * h * w for t, h, w in grids) // settings.merge_size**2
    num_image_tokens = int((segment.token_ids == settings.image_token_id).sum())
    if num_image_tokens != num_expected:
        raise DataError(
            f"{where}: got {num_image_tokens} image tokens, expected {num_expected} for grids {grids} "
            f"merged {settings.merge_size}x{settings.merge_size}; was the prompt truncated?"
        )
    if any(int(token_id) in settings.coord_ids for token_id in segment.token_ids[segment.ce_mask]):
        raise DataError(
            f"{where}: ce_mask marks a coordinate token, expected none; coordinates have a coordinate "
            "loss only"
        )


def _segment_positions(
    segment: MatchedSegment,
    pixels: SegmentPixels | None,
    settings: CollationSettings,
    positions_of: PositionRule,
) -> Tensor:
    token_ids = torch.from_numpy(segment.token_ids.astype(np.int64))[None]
    is_image_token = (token_ids == settings.image_token_id).to(torch.int32)
    multimodal = positions_of(token_ids, is_image_token, None if pixels is None else pixels.grids_thw)
    text = torch.arange(token_ids.shape[1]).view(1, 1, -1)
    return torch.cat([text, multimodal], dim=0)
