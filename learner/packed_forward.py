"""One forward of a packed row through a Qwen3-VL, attention never crossing a segment [P-10].

The text positions, restarting at 0 in each segment, are what transformers reads the segment borders from; it
does so only with no attention mask and no cache, and only from the first of four position rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learner.chunked_losses import row_losses
from learner.collation import PackedRow, PositionRule
from learner.losses import LossSettings, SegmentLosses


def position_rule_of(model: Any) -> PositionRule:
    """Return the model's own multimodal position rule for one unpadded segment."""

    def positions_of(input_ids: Tensor, is_image_token: Tensor, grids_thw: Tensor | None) -> Tensor:
        positions, _ = model.model.get_rope_index(
            input_ids, mm_token_type_ids=is_image_token, image_grid_thw=grids_thw
        )
        return torch.as_tensor(positions)

    return positions_of


def hidden_row(model: Any, row: PackedRow) -> Tensor:
    """Return the last hidden states (P, D) of ``row.kept_positions``.

    A segment's states are those of the segment alone: to the bit where the matrix kernels do not depend on
    the number of rows, otherwise to within 1e-5 in float32.
    """
    output = model.base_model(
        input_ids=row.input_ids,
        attention_mask=None,
        position_ids=row.position_ids,
        pixel_values=row.pixel_values,
        image_grid_thw=row.image_grid_thw,
        use_cache=False,
    )
    return torch.as_tensor(output.last_hidden_state)[0, row.kept_positions]


class RowLoss(torch.nn.Module):
    """Forward and losses of a packed row as one module, so that whoever shards it sees all of its weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: PackedRow, settings: LossSettings) -> tuple[Tensor, SegmentLosses]:
        """Return the sum of the row's segment losses, to be trained, and the losses, to be reported."""
        head = self.model.get_output_embeddings()
        return row_losses(hidden_row(self.model, row), head, row.supervision, settings)
