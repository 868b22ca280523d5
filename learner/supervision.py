"""Which logits of a packed row are trained on, and towards what: index arrays, no logits and no loss.

A token at position i of a row is predicted by the logits at i-1, so every row index here is already one less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from broker_schemas.records.records import MatchedSegment


@dataclass(frozen=True, kw_only=True)
class RowSupervision:
    """Index tensors of one packed row of N segments with C cross-entropy tokens, S coordinate slots
    and R tokens of repeated objects.

    ``ce_rows`` (C,), ``slot_rows`` (S,) int64 say which logits predict them; ``ce_labels`` (C,) int64 token
    ids; ``ce_is_desc`` (C,) bool; ``slot_targets`` (S,) int64 bins; ``slot_in_prefix`` (S,) bool;
    ``ce_segment`` (C,), ``slot_segment`` (S,), ``repeat_segment`` (R,) int64 index ``record_ids`` (N).
    ``repeat_rows`` (R,) predict the tokens of repeated objects, ``repeat_labels`` (R,) int64 are their ids.
    """

    record_ids: tuple[str, ...]
    ce_rows: Tensor
    ce_labels: Tensor
    ce_is_desc: Tensor
    ce_segment: Tensor
    slot_rows: Tensor
    slot_targets: Tensor
    slot_in_prefix: Tensor
    slot_segment: Tensor
    repeat_rows: Tensor
    repeat_labels: Tensor
    repeat_segment: Tensor

    @property
    def num_segments(self) -> int:
        return len(self.record_ids)

    def on_kept_rows(self) -> tuple[Tensor, RowSupervision]:
        """Return the row positions (P,) that predict something,
        rising, and the same supervision over only those.

        Logits computed at these positions alone (``logits_to_keep``)
        are what the returned supervision indexes.
        """
        kept = torch.unique(torch.cat([self.ce_rows, self.slot_rows, self.repeat_rows]), sorted=True)
        return kept, RowSupervision(
            record_ids=self.record_ids,
            ce_rows=torch.searchsorted(kept, self.ce_rows),
            ce_labels=self.ce_labels,
            ce_is_desc=self.ce_is_desc,
            ce_segment=self.ce_segment,
            slot_rows=torch.searchsorted(kept, self.slot_rows),
            slot_targets=self.slot_targets,
            slot_in_prefix=self.slot_in_prefix,
            slot_segment=self.slot_segment,
            repeat_rows=torch.searchsorted(kept, self.repeat_rows),
            repeat_labels=self.repeat_labels,
            repeat_segment=self.repeat_segment,
        )

    def to(self, device: torch.device) -> RowSupervision:
        """Return the same indices on ``device``."""
        moved = {
            name: on_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return RowSupervision(record_ids=self.record_ids, **moved)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; on its way to a GPU it waits for nothing that runs there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def supervise_row(segments: Sequence[MatchedSegment], *, with_repeats: bool = False) -> RowSupervision:
    """Return the supervision of segments that lie one after the other in a row, the first at position 0.

    No segments: all arrays empty. Without ``with_repeats`` the tokens of repeated objects are left out.
    """
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in RowSupervision.__dataclass_fields__ if name != "record_ids"
    }
    offset = 0
    for index, segment in enumerate(segments):
        positions = np.flatnonzero(segment.ce_mask)
        columns["ce_rows"].append(positions + (offset - 1))
        columns["ce_labels"].append(segment.token_ids[positions])
        columns["ce_is_desc"].append(segment.desc_mask[positions])
        columns["ce_segment"].append(np.full(len(positions), index))
        columns["slot_rows"].append(segment.slot_positions.astype(np.int64) + (offset - 1))
        columns["slot_targets"].append(segment.slot_targets)
        columns["slot_in_prefix"].append(segment.slot_in_prefix)
        columns["slot_segment"].append(np.full(len(segment.slot_positions), index))
        repeats = segment.repeat_positions.astype(np.int64) if with_repeats else np.zeros(0, np.int64)
        columns["repeat_rows"].append(repeats + (offset - 1))
        columns["repeat_labels"].append(segment.token_ids[repeats])
        columns["repeat_segment"].append(np.full(len(repeats), index))
        offset += segment.encoded_length
    joined = {name: _join(parts, is_flag=name in _FLAGS) for name, parts in columns.items()}
    return RowSupervision(record_ids=tuple(segment.record_id for segment in segments), **joined)


_FLAGS = frozenset({"ce_is_desc", "slot_in_prefix"})


def _join(parts: list[np.ndarray], *, is_flag: bool) -> Tensor:
    dtype = np.bool_ if is_flag else np.int64
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return torch.from_numpy(joined.astype(dtype, copy=True))
