"""The losses of ROLLOUT_MATCHING section 8, over all segments of a packed row at once.

Pure: logits and index tensors in, per-segment numbers out. It runs no collective; the number of segments of
the optimizer step is divided by elsewhere, so packing changes nothing [P-9].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from broker_schemas.errors import DataError, NonFiniteLoss
from broker_schemas.method.coordinates import NUM_BINS
from broker_schemas.records.records import MatchedSegment
from learner.supervision import RowSupervision, supervise_row


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss; raises ValueError outside their ranges and DataError for a broken vocabulary.

    ``coord_ids``: token ids of the 1000 bins in bin order. ``target_sigma``: width of the soft target in
    bins. ``target_truncate``: bins from the target beyond which it is zero; None keeps all of it.
    ``temperature_coord``: divides coordinate logits. ``*_weight``: weight of each term of the slot loss.
    ``desc_ce_weight``: weight of ``desc`` tokens in the mean cross-entropy (channel A; channel B masks
    them). ``duplicate_weight``: weight of the unlikelihood of repeated objects. ``chunk_positions``:
    supervised positions whose logits exist at a time, 0 for all of a row; read by ``chunked_losses`` [L-4].
    ``keeps_non_finite``: a loss that is not finite is left to the caller.
    """

    coord_ids: tuple[int, ...]
    target_sigma: float
    target_truncate: int | None
    temperature_coord: float
    soft_ce_weight: float
    w1_weight: float
    gate_weight: float
    desc_ce_weight: float
    duplicate_weight: float
    chunk_positions: int = 0
    keeps_non_finite: bool = False

    def __post_init__(self) -> None:
        if len(self.coord_ids) != NUM_BINS or len(set(self.coord_ids)) != NUM_BINS or min(self.coord_ids) < 0:
            raise DataError(
                f"loss settings: got {len(self.coord_ids)} coordinate ids, {len(set(self.coord_ids))} "
                f"distinct, expected {NUM_BINS} distinct ids >= 0 in bin order"
            )
        for name in ("target_sigma", "temperature_coord"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss settings: got {name} {getattr(self, name)}, expected above 0")
        for name in ("soft_ce_weight", "w1_weight", "gate_weight", "desc_ce_weight", "duplicate_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss settings: got {name} {getattr(self, name)}, expected 0 or more")
        if self.target_truncate is not None and self.target_truncate < 0:
            raise ValueError(f"loss settings: got target_truncate {self.target_truncate}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class SegmentLosses:
    """Losses of N segments, each (N,) float32 (float64 for float64
    logits); only ``total`` is meant to be trained.

    ``ce``: weighted mean over the segment's cross-entropy tokens, ``slot``: mean over its slots, ``repeat``:
    mean unlikelihood over the tokens of its repeated objects; 0 for none. ``slot_prefix``, ``slot_tail``:
    sums of slot losses of matched prefix slots and of appended ones; ``num_prefix_slots``,
    ``num_tail_slots`` their counts. ``soft_ce``, ``w1``, ``gate``: unweighted means.
    """

    record_ids: tuple[str, ...]
    total: Tensor
    ce: Tensor
    slot: Tensor
    soft_ce: Tensor
    w1: Tensor
    gate: Tensor
    repeat: Tensor
    slot_prefix: Tensor
    slot_tail: Tensor
    num_prefix_slots: Tensor
    num_tail_slots: Tensor


def segment_losses(
    logits: Tensor, segments: Sequence[MatchedSegment], settings: LossSettings
) -> SegmentLosses:
    """Return the losses of ``segments`` that lie one after the other in a packed row.

    ``logits`` (T, V): row i predicts token i+1; T is the sum of the encoded lengths. No segments: empty
    tensors. Raises NonFiniteLoss naming the segments whose loss is not finite, DataError for coordinate ids
    outside V, ValueError where T and the segments disagree.
    """
    num_tokens = sum(segment.encoded_length for segment in segments)
    if logits.ndim != 2 or logits.shape[0] != num_tokens:
        raise ValueError(f"segment losses: got logits {tuple(logits.shape)}, expected ({num_tokens}, V)")
    supervision = supervise_row(segments, with_repeats=settings.duplicate_weight > 0)
    return supervised_losses(logits, supervision.to(logits.device), settings)


def supervised_losses(logits: Tensor, supervision: RowSupervision, settings: LossSettings) -> SegmentLosses:
    """Return the losses of one row from the logits that
    ``supervision`` indexes, (T, V) or only the kept (P, V).

    Formulas: ROLLOUT_MATCHING section 8. Errors as ``segment_losses``.
    """
    terms = position_terms(logits, supervision, settings)
    return reduce_terms(terms, supervision, settings)


@dataclass(frozen=True, kw_only=True)
class PositionTerms:
    """Loss terms of C cross-entropy tokens, ``ce`` (C,), S slots, ``soft_ce``, ``w1``, ``gate`` (S,), and R
    tokens of repeated objects, ``repeat`` (R,).
    """

    ce: Tensor
    soft_ce: Tensor
    w1: Tensor
    gate: Tensor
    repeat: Tensor


def position_terms(logits: Tensor, supervision: RowSupervision, settings: LossSettings) -> PositionTerms:
    """Return the term of every supervised token of ``supervision``; raises DataError for coordinate ids
    outside the logits.
    """
    if max(settings.coord_ids) >= logits.shape[1]:
        raise DataError(
            f"losses: got coordinate id {max(settings.coord_ids)}, expected below the logits width "
            f"{logits.shape[1]}; resize the model's embeddings"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits[supervision.ce_rows].to(dtype)
    ce = torch.nn.functional.cross_entropy(chosen, supervision.ce_labels, reduction="none")
    soft_ce, w1, gate = _slot_terms(logits, supervision, settings, dtype)
    repeat = _unlikelihood(logits, supervision, settings, dtype)
    return PositionTerms(ce=ce, soft_ce=soft_ce, w1=w1, gate=gate, repeat=repeat)


def reduce_terms(terms: PositionTerms, supervision: RowSupervision, settings: LossSettings) -> SegmentLosses:
    """Return the losses of the row's segments from its terms; raises NonFiniteLoss naming the segments,
    unless the settings keep them.
    """
    num_segments, dtype = supervision.num_segments, terms.ce.dtype
    ce_weights = cross_entropy_weights(supervision, settings, dtype)
    slots = slot_losses(terms, settings)
    in_prefix = supervision.slot_in_prefix.to(dtype)
    slot_segment = supervision.slot_segment
    ce_mean = _segment_mean(terms.ce * ce_weights, supervision.ce_segment, num_segments, ce_weights)
    slot_mean = _segment_mean(slots, slot_segment, num_segments)
    repeat_mean = _segment_mean(terms.repeat, supervision.repeat_segment, num_segments)
    losses = SegmentLosses(
        record_ids=supervision.record_ids,
        total=ce_mean + slot_mean + settings.duplicate_weight * repeat_mean,
        ce=ce_mean,
        slot=slot_mean,
        soft_ce=_segment_mean(terms.soft_ce, slot_segment, num_segments),
        w1=_segment_mean(terms.w1, slot_segment, num_segments),
        gate=_segment_mean(terms.gate, slot_segment, num_segments),
        repeat=repeat_mean,
        slot_prefix=_segment_sum(slots.detach() * in_prefix, slot_segment, num_segments),
        slot_tail=_segment_sum(slots.detach() * (1 - in_prefix), slot_segment, num_segments),
        num_prefix_slots=_segment_sum(in_prefix, slot_segment, num_segments),
        num_tail_slots=_segment_sum(1 - in_prefix, slot_segment, num_segments),
    )
    if not settings.keeps_non_finite:
        check_finite(losses)
    return losses


def slot_losses(terms: PositionTerms, settings: LossSettings) -> Tensor:
    """Return the weighted loss of each slot (S,)."""
    return (
        settings.soft_ce_weight * terms.soft_ce
        + settings.w1_weight * terms.w1
        + settings.gate_weight * terms.gate
    )


def cross_entropy_weights(supervision: RowSupervision, settings: LossSettings, dtype: torch.dtype) -> Tensor:
    """Return the weight (C,) of each cross-entropy token in its segment's mean."""
    return torch.where(supervision.ce_is_desc, settings.desc_ce_weight, 1.0).to(dtype)


def shares_of_total(
    supervision: RowSupervision, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return by how much the sum of all segments' losses grows with each ``ce``, slot and ``repeat``.

    Shapes (C,), (S,) and (R,).
    """
    num_segments = supervision.num_segments
    weights = cross_entropy_weights(supervision, settings, dtype)
    total_weight = _segment_sum(weights, supervision.ce_segment, num_segments)
    ones = torch.ones_like(supervision.slot_segment, dtype=dtype)
    num_slots = _segment_sum(ones, supervision.slot_segment, num_segments)
    ce_shares = weights / total_weight.masked_fill(total_weight == 0, 1)[supervision.ce_segment]
    repeats = torch.ones_like(supervision.repeat_segment, dtype=dtype)
    num_repeats = _segment_sum(repeats, supervision.repeat_segment, num_segments)
    repeat_shares = settings.duplicate_weight * repeats / num_repeats[supervision.repeat_segment]
    return ce_shares, ones / num_slots[supervision.slot_segment], repeat_shares


def soft_targets(target_bins: Tensor, settings: LossSettings, dtype: torch.dtype) -> Tensor:
    """Return q (S, 1000): q_k ∝ exp(-(k-t)²/(2σ²)), zero beyond ``target_truncate``, rows sum to 1."""
    bins = torch.arange(NUM_BINS, device=target_bins.device, dtype=dtype)
    distance = bins[None, :] - target_bins.to(dtype)[:, None]
    exponent = -distance.square() / (2 * settings.target_sigma**2)
    if settings.target_truncate is not None:
        exponent = exponent.masked_fill(distance.abs() > settings.target_truncate, -torch.inf)
    return torch.softmax(exponent, dim=1)


def _slot_terms(
    logits: Tensor, supervision: RowSupervision, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = logits[supervision.slot_rows].to(dtype) / settings.temperature_coord
    coord_ids = _ids_on(settings.coord_ids, logits.device)
    coord = scaled[:, coord_ids]
    log_p = torch.log_softmax(coord, dim=1)
    q = soft_targets(supervision.slot_targets, settings, dtype)
    soft_ce = -(q * log_p).sum(dim=1)
    w1 = (log_p.exp() - q).cumsum(dim=1).abs().mean(dim=1)
    gate = scaled.logsumexp(dim=1) - coord.logsumexp(dim=1)
    return soft_ce, w1, gate


def _unlikelihood(
    logits: Tensor, supervision: RowSupervision, settings: LossSettings, dtype: torch.dtype
) -> Tensor:
    """Return -log(1 - p) (R,) of each token of a repeated object, p its probability.

    p is among the coordinates for a coordinate, among all tokens for any other [M-8]. As a difference of two
    sums it stays finite, with gradients of at most 1, where p is 1.
    """
    labels = supervision.repeat_labels
    if not len(labels):
        return logits.new_zeros(0, dtype=dtype)
    chosen = logits[supervision.repeat_rows].to(dtype)
    is_coord = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    is_coord[list(settings.coord_ids)] = True
    coord = is_coord[labels][:, None]
    scores = torch.where(coord, chosen / settings.temperature_coord, chosen)
    scores = scores.masked_fill(coord & ~is_coord, -torch.inf)
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return scores.logsumexp(dim=1) - others.logsumexp(dim=1)


@lru_cache(maxsize=8)
def _ids_on(token_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ids on ``device``; copied once, for every copy waits for the device."""
    return torch.tensor(token_ids, device=device)


def _segment_sum(values: Tensor, segment_of: Tensor, num_segments: int) -> Tensor:
    return values.new_zeros(num_segments).index_add(0, segment_of, values)


def _segment_mean(
    values: Tensor, segment_of: Tensor, num_segments: int, weights: Tensor | None = None
) -> Tensor:
    weights = torch.ones_like(values) if weights is None else weights
    total_weight = _segment_sum(weights, segment_of, num_segments)
    summed = _segment_sum(values, segment_of, num_segments)
    return summed / total_weight.masked_fill(total_weight == 0, 1)


def check_finite(losses: SegmentLosses) -> None:
    """Raise NonFiniteLoss naming the segments whose loss is not finite."""
    finite = torch.isfinite(losses.total.detach())
    if bool(finite.all()):
        return
    broken = [
        f"{name} (ce {float(losses.ce[index].detach())}, coordinate {float(losses.slot[index].detach())})"
        for index, name in enumerate(losses.record_ids)
        if not bool(finite[index])
    ]
    raise NonFiniteLoss(
        f"loss of segment {', '.join(broken)}: got a value that is not finite, expected a number; "
        "lower the learning rate or look at the segment with `rollstream inspect`"
    )
