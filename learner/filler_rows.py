"""Rows and segments without loss, which keep the ranks of a sharded model in step [S-7, L-3]."""

from __future__ import annotations

from typing import Any

import torch

from learner.collation import PackedRow
from learner.step_rows import RowSources
from learner.supervision import supervise_row


def with_filler(row: PackedRow | None, model: Any, sources: RowSources) -> PackedRow:
    """Return ``row`` with at least one image: a row without any gets a segment of one image and no loss.

    None: a row of that segment alone. Without an image one rank would not run the vision tower, and the
    others would wait for it.
    """
    if row is not None and row.pixel_values is not None:
        return row
    filler = _filler_row(model, sources)
    if row is None:
        return filler
    return PackedRow(
        input_ids=torch.cat([row.input_ids, filler.input_ids], dim=1),
        position_ids=torch.cat([row.position_ids, filler.position_ids], dim=2),
        pixel_values=filler.pixel_values,
        image_grid_thw=filler.image_grid_thw,
        kept_positions=row.kept_positions,
        supervision=row.supervision,
    )


def _filler_row(model: Any, sources: RowSources) -> PackedRow:
    side, vision = sources.collation.merge_size, model.config.vision_config
    channels = getattr(vision, "in_channels", 3)
    patch_values = channels * vision.temporal_patch_size * vision.patch_size**2
    input_ids = torch.tensor([[sources.collation.image_token_id]])
    grids = torch.tensor([[1, side, side]])
    multimodal = sources.positions_of(input_ids, torch.ones_like(input_ids, dtype=torch.int32), grids)
    kept_positions, supervision = supervise_row([]).on_kept_rows()
    return PackedRow(
        input_ids=input_ids,
        position_ids=torch.cat([torch.zeros(1, 1, 1, dtype=multimodal.dtype), multimodal], dim=0),
        pixel_values=torch.zeros(side * side, patch_values),
        image_grid_thw=grids,
        kept_positions=kept_positions,
        supervision=supervision,
    )
