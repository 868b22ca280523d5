"""Losses of ROLLOUT_MATCHING section 8 against float64 numpy and numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from broker_schemas.errors import DataError, NonFiniteLoss
from broker_schemas.records.records import MatchedSegment
from learner.losses import LossSettings, SegmentLosses, segment_losses, soft_targets, supervised_losses
from learner.supervision import supervise_row
from tests.builders.learners import COORD_IDS, FIRST_COORD_ID, VOCABULARY_SIZE, make_segment
from tests.builders.settings import loss_settings

SETTINGS = loss_settings(coord_ids=COORD_IDS)


def random_logits(num_tokens: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_tokens, VOCABULARY_SIZE, generator=generator)


def log_sum_exp(values: NDArray[np.float64]) -> float:
    peak = float(values.max())
    return peak + math.log(float(np.exp(values - peak).sum()))


def reference_slot(z: NDArray[np.float64], target: int, settings: LossSettings) -> tuple[float, float, float]:
    """Section 8 written out for one slot, with no shared code."""
    s = z[list(settings.coord_ids)]
    t = settings.temperature_coord
    p = np.exp(s / t - log_sum_exp(s / t))
    q = np.zeros(1000)
    for k in range(1000):
        if settings.target_truncate is None or abs(k - target) <= settings.target_truncate:
            q[k] = math.exp(-((k - target) ** 2) / (2 * settings.target_sigma**2))
    q /= q.sum()
    soft_ce = -sum(q[k] * math.log(p[k]) for k in range(1000))
    cdf_p, cdf_q, w1 = 0.0, 0.0, 0.0
    for k in range(1000):
        cdf_p, cdf_q = cdf_p + p[k], cdf_q + q[k]
        w1 += abs(cdf_p - cdf_q) / 1000
    return soft_ce, w1, log_sum_exp(z / t) - log_sum_exp(s / t)


def reference_segment(
    z: NDArray[np.float64], segment: MatchedSegment, settings: LossSettings
) -> tuple[float, float]:
    ce, weights = [], []
    for position in np.flatnonzero(segment.ce_mask):
        row = z[position - 1]
        ce.append(log_sum_exp(row) - row[segment.token_ids[position]])
        weights.append(settings.desc_ce_weight if segment.desc_mask[position] else 1.0)
    slots = []
    for position, target in zip(segment.slot_positions, segment.slot_targets, strict=True):
        soft_ce, w1, gate = reference_slot(z[position - 1], int(target), settings)
        slots.append(
            settings.soft_ce_weight * soft_ce + settings.w1_weight * w1 + settings.gate_weight * gate
        )
    ce_mean = float(np.dot(ce, weights) / sum(weights)) if sum(weights) else 0.0
    return ce_mean, float(np.mean(slots)) if slots else 0.0


@pytest.mark.req("M-8")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_sigma": 0.7, "temperature_coord": 1.7},
        {"target_truncate": 3, "soft_ce_weight": 0.5, "w1_weight": 5.0, "gate_weight": 0.25},
        {"target_truncate": 0, "desc_ce_weight": 0.3},
    ],
)
def test_a_row_equals_the_formulas_in_float64_numpy(changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **changes)
    segments = [
        make_segment("r-0", seed=1, slot_targets=np.array([0, 999, 500, 3], np.int16)),
        make_segment("r-1", seed=2, num_text=0, num_slots=3, num_prefix_slots=0),
        make_segment("r-2", seed=3, num_slots=0, num_prefix_slots=0),
    ]
    logits = random_logits(sum(s.encoded_length for s in segments), seed=5)
    losses = segment_losses(logits, segments, settings)
    offset = 0
    for index, segment in enumerate(segments):
        rows = logits[offset : offset + segment.encoded_length].numpy().astype(np.float64)
        ce, slot = reference_segment(rows, segment, settings)
        assert losses.ce[index].item() == pytest.approx(ce, rel=2e-5)
        assert losses.slot[index].item() == pytest.approx(slot, rel=2e-5)
        assert losses.total[index].item() == pytest.approx(ce + slot, rel=2e-5)
        offset += segment.encoded_length


@pytest.mark.req("M-8")
def test_uniform_logits_give_the_numbers_worked_by_hand() -> None:
    """p is 1/1000 everywhere; with truncation 0 all of q sits on bin 0.

    softCE = log 1000; W1 = (1/1000) Σ (1 - (k+1)/1000) = 0.4995; gate = log 1300 - log 1000; CE = log 1300.
    """
    segment = make_segment(num_slots=1, num_prefix_slots=1, slot_targets=np.array([0], np.int16))
    settings = replace(SETTINGS, target_truncate=0)
    losses = segment_losses(torch.zeros(segment.encoded_length, VOCABULARY_SIZE), [segment], settings)
    assert losses.soft_ce[0].item() == pytest.approx(6.907755, abs=1e-5)
    assert losses.w1[0].item() == pytest.approx(0.4995, abs=1e-5)
    assert losses.gate[0].item() == pytest.approx(0.262364, abs=1e-5)
    assert losses.ce[0].item() == pytest.approx(7.170120, abs=1e-5)
    assert losses.total[0].item() == pytest.approx(6.907755 + 0.4995 + 0.262364 + 7.170120, abs=1e-4)


@pytest.mark.req("M-8")
def test_soft_target_is_the_renormalised_gaussian_worked_by_hand() -> None:
    """σ = 1, truncated to 1 at bin 0: weights 1 and e^-½ = 0.606531, so 0.622459 and 0.377541."""
    q = soft_targets(torch.tensor([0]), replace(SETTINGS, target_sigma=1.0, target_truncate=1), torch.float32)
    assert q[0, :3].tolist() == pytest.approx([0.622459, 0.377541, 0.0], abs=1e-6)
    assert q.sum().item() == pytest.approx(1.0)


@pytest.mark.req("M-8")
@pytest.mark.parametrize("term", ["ce", "soft_ce", "w1", "gate"])
def test_every_term_has_a_gradient(term: str) -> None:
    weights = {f"{name}_weight": float(name == term) for name in ("soft_ce", "w1", "gate")}
    segment = make_segment(num_slots=4, num_text=0 if term != "ce" else 5)
    logits = random_logits(segment.encoded_length).requires_grad_()
    losses = segment_losses(logits, [segment], replace(SETTINGS, **weights))
    losses.total.sum().backward()
    assert logits.grad is not None
    supervised = np.flatnonzero(segment.ce_mask) if term == "ce" else segment.slot_positions
    norms = logits.grad.norm(dim=1)
    assert (norms[supervised - 1] > 0).all()
    norms[supervised - 1] = 0
    assert (norms == 0).all(), "a position that is not supervised has a gradient"


@pytest.mark.req("M-8")
def test_prefix_coordinates_never_enter_full_vocabulary_cross_entropy() -> None:
    """Without the gate, logits outside the 1000 bins have no gradient at a coordinate slot."""
    segment = make_segment(num_text=0)
    logits = random_logits(segment.encoded_length).requires_grad_()
    settings = replace(SETTINGS, gate_weight=0.0)
    segment_losses(logits, [segment], settings).total.sum().backward()
    assert logits.grad is not None
    outside = torch.cat([logits.grad[:, :FIRST_COORD_ID], logits.grad[:, FIRST_COORD_ID + 1000 :]], dim=1)
    assert (outside == 0).all()
    assert (logits.grad[:, FIRST_COORD_ID : FIRST_COORD_ID + 1000] != 0).any()


@pytest.mark.req("P-9")
def test_a_segment_has_the_same_loss_alone_and_in_a_row() -> None:
    segments = [make_segment(f"r-{index}", seed=index, num_text=3 + index) for index in range(3)]
    logits = random_logits(sum(s.encoded_length for s in segments))
    together = segment_losses(logits, segments, SETTINGS)
    offset = 0
    for index, segment in enumerate(segments):
        rows = logits[offset : offset + segment.encoded_length]
        assert segment_losses(rows, [segment], SETTINGS).total[0] == together.total[index]
        offset += segment.encoded_length


def test_kept_rows_alone_give_the_same_losses() -> None:
    segments = [make_segment(f"r-{index}", seed=index) for index in range(2)]
    logits = random_logits(sum(s.encoded_length for s in segments))
    kept, supervision = supervise_row(segments).on_kept_rows()
    from_kept = supervised_losses(logits[kept], supervision, SETTINGS)
    assert torch.equal(from_kept.total, segment_losses(logits, segments, SETTINGS).total)
    assert len(kept) < len(logits)


@pytest.mark.req("M-12")
def test_prefix_and_tail_slots_are_reported_apart_and_add_up() -> None:
    segment = make_segment(num_slots=5, num_prefix_slots=2)
    losses = segment_losses(random_logits(segment.encoded_length), [segment], SETTINGS)
    assert (losses.num_prefix_slots[0], losses.num_tail_slots[0]) == (2, 3)
    summed = (losses.slot_prefix[0] + losses.slot_tail[0]).item()
    assert summed / 5 == pytest.approx(losses.slot[0].item(), rel=1e-5)


def test_desc_weight_zero_is_the_same_as_masking_desc() -> None:
    segment = make_segment(num_text=6)
    masked = replace(segment, ce_mask=segment.ce_mask & ~segment.desc_mask)
    logits = random_logits(segment.encoded_length)
    weighted = segment_losses(logits, [segment], replace(SETTINGS, desc_ce_weight=0.0))
    assert weighted.ce[0].item() == pytest.approx(segment_losses(logits, [masked], SETTINGS).ce[0].item())


def test_no_segments_give_empty_losses() -> None:
    losses = segment_losses(torch.zeros(0, VOCABULARY_SIZE), [], SETTINGS)
    assert losses.total.shape == (0,)


def test_a_segment_without_slots_or_text_has_zero_for_that_part() -> None:
    only_text = make_segment(num_slots=0, num_prefix_slots=0)
    losses = segment_losses(random_logits(only_text.encoded_length), [only_text], SETTINGS)
    assert losses.slot[0] == 0
    assert losses.total[0] == losses.ce[0] > 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    segment = make_segment()
    logits = random_logits(segment.encoded_length).to(torch.bfloat16)
    losses: SegmentLosses = segment_losses(logits, [segment], SETTINGS)
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.total, segment_losses(logits.float(), [segment], SETTINGS).total)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_segment(value: float) -> None:
    segments = [make_segment("r-good", seed=1), make_segment("r-bad", seed=2)]
    logits = random_logits(sum(s.encoded_length for s in segments))
    logits[segments[0].encoded_length + int(segments[1].slot_positions[0]) - 1, 250] = value
    with pytest.raises(NonFiniteLoss, match="r-bad") as caught:
        segment_losses(logits, segments, SETTINGS)
    assert "r-good" not in str(caught.value)


@pytest.mark.req("M-11")
def test_coordinate_ids_that_are_not_1000_or_outside_the_logits_are_refused() -> None:
    with pytest.raises(DataError, match="999 distinct"):
        loss_settings(coord_ids=(*COORD_IDS[:-1], COORD_IDS[0]))
    segment = make_segment()
    with pytest.raises(DataError, match="logits width 1199"):
        segment_losses(torch.zeros(segment.encoded_length, 1199), [segment], SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [{"target_sigma": 0.0}, {"temperature_coord": -1.0}, {"w1_weight": -0.1}, {"target_truncate": -1}],
)
def test_settings_outside_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(SETTINGS, **changes)


def test_logits_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        segment_losses(torch.zeros(3, VOCABULARY_SIZE), [make_segment()], SETTINGS)
