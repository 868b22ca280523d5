"""Objects that a rollout wrote again: which tokens are theirs, and what unlearning them does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject, MatchedSegment
from consumers.record_matching import MatcherTools, match_record
from consumers.token_bytes import token_bytes_of
from learner.losses import LossSettings, segment_losses
from tests.builders.learners import COORD_IDS, FIRST_COORD_ID, VOCABULARY_SIZE, make_segment
from tests.builders.qwen_tokenizer import qwen_tokenizer
from tests.builders.rollouts import make_rollout
from tests.builders.settings import loss_settings, method_settings
from tests.builders.tokenizers import make_box, make_polygon, plain_tokenizer

CELL = make_box("cell", (100, 100, 300, 300))
AGAIN = make_box("cell", (101, 100, 300, 301))
OTHER_NAME = make_box("dot", (100, 100, 300, 300))
LEAF = make_polygon("leaf", (600, 100, 700, 100, 700, 250))
REPEAT = 3
TEXT, COORDINATE = 7, FIRST_COORD_ID + 40


def matched(said: list[GroundTruthObject], tokenizer: Any = None) -> MatchedSegment:
    """Return the segment of a rollout that says ``said`` where one cell and a leaf are true."""
    chosen = tokenizer or plain_tokenizer()
    text = render_payload(said).text + "<|im_end|>"
    record = make_rollout([CELL, LEAF], response=text, tokenizer=chosen)
    segment = match_record(
        record, MatcherTools.for_tokenizer(chosen, capacity=4096, **method_settings())
    ).segment
    assert segment is not None
    return segment


def repeated_text(segment: MatchedSegment, tokenizer: Any) -> list[str]:
    table = token_bytes_of(tokenizer)
    return [table.text([token_id]) for token_id in segment.token_ids[segment.repeat_positions].tolist()]


@pytest.mark.req("M-12")
def test_coordinates_and_structure_of_a_repeat_are_marked_from_the_comma_on_without_its_name() -> None:
    segment = matched([CELL, AGAIN, LEAF])
    # this tokenizer writes a comma and the closing before it as one token: the first is the repeat's
    # decision, that after the repeat is the next object's
    text = "".join(repeated_text(segment, plain_tokenizer()))
    coordinates = '"<|coord_101|>", "<|coord_100|>", "<|coord_300|>", "<|coord_301|>'
    assert text == '"]}, "object_2": {"desc": "", "bbox_2d": [' + coordinates
    assert segment.counters["duplicates"] == 1
    assert segment.counters["matched"] == 2


@pytest.mark.req("M-12")
def test_with_a_qwen_tokenizer_the_token_by_which_the_model_went_on_is_marked() -> None:
    texts = repeated_text(matched([CELL, AGAIN], qwen_tokenizer()), qwen_tokenizer())
    assert texts[:3] == ["},", ' "', "object"]
    assert "cell" not in "".join(texts)
    assert texts[-2:] == ["<|coord_301|>", '"]'] or texts[-1] == "<|coord_301|>"


@pytest.mark.req("M-12")
@pytest.mark.parametrize("said", [[CELL, OTHER_NAME], [CELL, make_box("cell", (100, 100, 300, 400))], [LEAF]])
def test_another_name_or_another_place_is_no_repeat(said: list[GroundTruthObject]) -> None:
    segment = matched(said)
    assert segment.counters["duplicates"] == 0
    assert len(segment.repeat_positions) == 0


@pytest.mark.req("M-12")
def test_a_repeat_that_is_matched_itself_is_counted_and_not_unlearned() -> None:
    worse = make_box("cell", (104, 104, 300, 300))
    segment = matched([worse, CELL])
    assert segment.counters["duplicates"] == 1
    assert len(segment.repeat_positions) == 0
    assert segment.slot_in_prefix.sum() == 4


@pytest.mark.req("M-12")
def test_every_further_repeat_is_marked_polygons_too() -> None:
    segment = matched([LEAF, LEAF, CELL, LEAF])
    text = "".join(repeated_text(segment, plain_tokenizer()))
    assert segment.counters["duplicates"] == 2
    assert text.count("<|coord_600|>") == 2
    assert '"object_2"' in text
    assert '"object_4"' in text
    assert '"object_3"' not in text


def a_segment(**changes: Any) -> MatchedSegment:
    """Return a segment whose prefix holds, after two matched slots, a text and a coordinate of a repeat."""
    segment = make_segment(num_slots=4, num_prefix_slots=2)
    first = segment.prompt_length
    token_ids = segment.token_ids.copy()
    token_ids[first + 2], token_ids[first + 3] = TEXT, COORDINATE
    fields: dict[str, Any] = {
        "token_ids": token_ids,
        "slot_positions": segment.slot_positions[:2],
        "slot_targets": segment.slot_targets[:2],
        "slot_in_prefix": segment.slot_in_prefix[:2],
        "repeat_positions": np.array([first + 2, first + 3], np.int32),
    }
    return replace(segment, **{**fields, **changes})


def settings(**changes: Any) -> LossSettings:
    return loss_settings(coord_ids=COORD_IDS, **changes)


def logits_for(segment: MatchedSegment, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(segment.encoded_length, VOCABULARY_SIZE, generator=generator, dtype=dtype)


@pytest.mark.req("M-8")
def test_the_unlikelihood_is_that_of_the_formula_among_all_tokens_or_the_coordinates() -> None:
    segment, chosen = a_segment(), settings(duplicate_weight=0.5, temperature_coord=1.7)
    logits = logits_for(segment)
    losses = segment_losses(logits, [segment], chosen)
    text_row, coordinate_row = (logits[int(place) - 1] for place in segment.repeat_positions)
    of_text = torch.softmax(text_row, dim=0)[TEXT]
    among = torch.softmax(coordinate_row[list(COORD_IDS)] / 1.7, dim=0)[COORDINATE - FIRST_COORD_ID]
    expected = float(-(torch.log1p(-of_text) + torch.log1p(-among)) / 2)
    assert float(losses.repeat[0]) == pytest.approx(expected, rel=1e-9)
    plain = segment_losses(logits, [segment], replace(chosen, duplicate_weight=0.0))
    assert float(losses.total[0] - plain.total[0]) == pytest.approx(0.5 * expected, rel=1e-9)


@pytest.mark.req("M-8")
def test_its_gradient_makes_both_tokens_less_likely_and_touches_nothing_else() -> None:
    segment = a_segment()
    logits = logits_for(segment).requires_grad_()

    def gradient(weight: float) -> torch.Tensor:
        losses = segment_losses(logits, [segment], settings(duplicate_weight=weight))
        return torch.autograd.grad(losses.total.sum(), logits)[0]

    added = gradient(1.0) - gradient(0.0)
    text_row, coordinate_row = (int(place) - 1 for place in segment.repeat_positions)
    assert added[text_row, TEXT] > 0
    assert added[coordinate_row, COORDINATE] > 0
    assert (added[text_row, [i for i in range(VOCABULARY_SIZE) if i != TEXT]] < 0).all()
    outside = [i for i in range(VOCABULARY_SIZE) if i not in set(COORD_IDS)]
    assert (added[coordinate_row, outside] == 0).all()
    added[[text_row, coordinate_row]] = 0
    assert (added.abs() < 1e-15).all()


@pytest.mark.req("M-8")
def test_a_token_that_is_certain_has_a_finite_loss_and_the_gradient_one() -> None:
    segment = a_segment()
    logits = torch.zeros(segment.encoded_length, VOCABULARY_SIZE)
    row = int(segment.repeat_positions[0]) - 1
    logits[row, TEXT] = 200.0
    logits.requires_grad_()
    losses = segment_losses(logits, [segment], settings(duplicate_weight=1.0))
    losses.total.sum().backward()
    assert torch.isfinite(losses.total).all()
    assert logits.grad is not None
    assert float(logits.grad[row, TEXT]) == pytest.approx(1 / 2, abs=1e-3)


@pytest.mark.req("M-8")
def test_off_by_default_it_changes_no_bit() -> None:
    segment = a_segment()
    without = replace(segment, repeat_positions=np.zeros(0, np.int32))
    logits = logits_for(segment, torch.float32)
    with_marks, bare = (segment_losses(logits, [item], settings()) for item in (segment, without))
    assert torch.equal(with_marks.total, bare.total)
    assert float(with_marks.repeat[0]) == 0
