"""The losses of a row with logits of a few positions at a time, so that their memory is flat [L-4].

A row's logits would be the largest tensor of all: 150,000 words are 0.6 MB a position, several times over.
The loss is a sum over positions with known shares, so each chunk's gradient is taken on the spot and its
logits are let go. Gradients are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from learner.losses import (
    LossSettings,
    PositionTerms,
    SegmentLosses,
    position_terms,
    reduce_terms,
    shares_of_total,
    slot_losses,
    supervised_losses,
)
from learner.supervision import RowSupervision

Head = Callable[[Tensor], Tensor]
"""Hidden states (P, D) -> logits (P, V)."""


def row_losses(
    hidden: Tensor, head: torch.nn.Module, supervision: RowSupervision, settings: LossSettings
) -> tuple[Tensor, SegmentLosses]:
    """Return the sum of the row's segment losses, to be trained, and the losses themselves, to be reported.

    ``hidden`` (P, D) of the kept positions that ``supervision`` indexes. Errors as ``supervised_losses``.
    """
    if not 0 < settings.chunk_positions < hidden.shape[0]:
        losses = supervised_losses(head(hidden), supervision, settings)
        return losses.total.sum(), losses
    weights = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    total, *terms = _ChunkedLoss.apply(hidden, head, supervision, settings, *weights)  # type: ignore[no-untyped-call]
    names = [field.name for field in fields(PositionTerms)]
    named = PositionTerms(**dict(zip(names, terms, strict=True)))
    return total, reduce_terms(named, supervision, settings)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        supervision: RowSupervision,
        settings: LossSettings,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        is_trained = any(ctx.needs_input_grad)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = _Sums(hidden, weights, supervision, dtype)
        shares = shares_of_total(supervision, settings, dtype)
        for chunk in _chunks(supervision, hidden.shape[0], settings.chunk_positions):
            with torch.set_grad_enabled(is_trained):
                piece = hidden[chunk.first : chunk.end].detach().requires_grad_(is_trained)
                terms = position_terms(head(piece), chunk.supervision, settings)
                loss = (terms.ce * shares[0][chunk.ce_places]).sum()
                loss = loss + (slot_losses(terms, settings) * shares[1][chunk.slot_places]).sum()
                loss = loss + (terms.repeat * shares[2][chunk.repeat_places]).sum()
            sums.note(chunk, terms, loss)
            if is_trained:
                sums.add_gradients(chunk, torch.autograd.grad(loss, [piece, *weights]))
        ctx.gradients = sums.gradients()
        terms_of_row = (sums.ce, *sums.slots, sums.repeat)
        ctx.mark_non_differentiable(*terms_of_row)
        return sums.total, *terms_of_row

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        of_hidden, *of_weights = (gradient * total_gradient.to(gradient.dtype) for gradient in ctx.gradients)
        ctx.gradients = ()
        return of_hidden, None, None, None, *of_weights


class _Chunk:
    """Positions ``first`` to ``end`` of the kept ones, and which supervised tokens they predict."""

    def __init__(
        self,
        supervision: RowSupervision,
        ce_places: Tensor,
        slot_places: Tensor,
        repeat_places: Tensor,
        first: int,
    ) -> None:
        self.first = first
        self.ce_places, self.slot_places, self.repeat_places = ce_places, slot_places, repeat_places
        self.supervision = RowSupervision(
            record_ids=supervision.record_ids,
            ce_rows=supervision.ce_rows[ce_places] - first,
            ce_labels=supervision.ce_labels[ce_places],
            ce_is_desc=supervision.ce_is_desc[ce_places],
            ce_segment=supervision.ce_segment[ce_places],
            slot_rows=supervision.slot_rows[slot_places] - first,
            slot_targets=supervision.slot_targets[slot_places],
            slot_in_prefix=supervision.slot_in_prefix[slot_places],
            slot_segment=supervision.slot_segment[slot_places],
            repeat_rows=supervision.repeat_rows[repeat_places] - first,
            repeat_labels=supervision.repeat_labels[repeat_places],
            repeat_segment=supervision.repeat_segment[repeat_places],
        )
        self.end = first


def _chunks(supervision: RowSupervision, num_positions: int, chunk_positions: int) -> Iterator[_Chunk]:
    ce_order, ce_bounds = _places(supervision.ce_rows, num_positions, chunk_positions)
    slot_order, slot_bounds = _places(supervision.slot_rows, num_positions, chunk_positions)
    repeat_order, repeat_bounds = _places(supervision.repeat_rows, num_positions, chunk_positions)
    for index, first in enumerate(range(0, num_positions, chunk_positions)):
        chunk = _Chunk(
            supervision,
            ce_order[ce_bounds[index] : ce_bounds[index + 1]],
            slot_order[slot_bounds[index] : slot_bounds[index + 1]],
            repeat_order[repeat_bounds[index] : repeat_bounds[index + 1]],
            first,
        )
        chunk.end = min(first + chunk_positions, num_positions)
        yield chunk


def _places(rows: Tensor, num_positions: int, chunk_positions: int) -> tuple[Tensor, list[int]]:
    """Return the order of rising rows, and where in it each chunk begins, and the end."""
    order = torch.argsort(rows, stable=True)
    edges = torch.arange(0, num_positions + chunk_positions, chunk_positions, device=rows.device)
    return order, torch.searchsorted(rows[order], edges).tolist()


class _Sums:
    """What chunks add up to: the total, the terms in their places, the gradients in float32."""

    def __init__(
        self, hidden: Tensor, weights: tuple[Tensor, ...], supervision: RowSupervision, dtype: torch.dtype
    ) -> None:
        self.total = hidden.new_zeros((), dtype=dtype)
        self.ce = hidden.new_zeros(supervision.ce_rows.shape[0], dtype=dtype)
        self.slots = [hidden.new_zeros(supervision.slot_rows.shape[0], dtype=dtype) for _ in range(3)]
        self.repeat = hidden.new_zeros(supervision.repeat_rows.shape[0], dtype=dtype)
        self._of_hidden = torch.zeros_like(hidden)
        self._of_weights = [torch.zeros_like(weight, dtype=dtype) for weight in weights]
        self._weights = weights

    def note(self, chunk: _Chunk, terms: PositionTerms, loss: Tensor) -> None:
        self.total += loss.detach()
        self.ce[chunk.ce_places] = terms.ce.detach()
        for into, found in zip(self.slots, (terms.soft_ce, terms.w1, terms.gate), strict=True):
            into[chunk.slot_places] = found.detach()
        self.repeat[chunk.repeat_places] = terms.repeat.detach()

    def add_gradients(self, chunk: _Chunk, found: tuple[Tensor, ...]) -> None:
        self._of_hidden[chunk.first : chunk.end] = found[0]
        for into, gradient in zip(self._of_weights, found[1:], strict=True):
            into += gradient

    def gradients(self) -> tuple[Tensor, ...]:
        in_their_format = zip(self._of_weights, self._weights, strict=True)
        return self._of_hidden, *(gradient.to(weight.dtype) for gradient, weight in in_their_format)
