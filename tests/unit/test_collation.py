"""Collation: one row, four position rows, and every contradiction refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from broker_schemas.errors import DataError
from broker_schemas.records.records import ImageReference, MatchedSegment
from learner.collation import PackedRow, SegmentPixels, collate_row
from tests.builders.learners import COLLATION, FIRST_COORD_ID, IMAGE_TOKEN_ID, make_pixels, make_segment


def ramp_positions(input_ids: Tensor, is_image_token: Tensor, grids_thw: Tensor | None) -> Tensor:
    """Stand for the model's rule: 100 a row, plus the number of image tokens seen."""
    length = input_ids.shape[1]
    rows = torch.arange(3).view(3, 1, 1) * 100
    return rows + torch.arange(length).view(1, 1, -1) + is_image_token.sum()


def collate(*segments: MatchedSegment) -> PackedRow:
    return collate_row(segments, [make_pixels(s) for s in segments], COLLATION, ramp_positions)


def test_a_row_is_the_segments_one_after_the_other() -> None:
    first, second = make_segment("r-0", seed=1), make_segment("r-1", seed=2, grid_thw=None)
    row = collate(first, second)
    assert row.input_ids[0].tolist() == [*first.token_ids.tolist(), *second.token_ids.tolist()]
    assert row.num_tokens == first.encoded_length + second.encoded_length
    assert row.supervision.record_ids == ("r-0", "r-1")


@pytest.mark.req("P-10")
def test_text_positions_restart_at_zero_and_the_models_rule_fills_the_other_rows() -> None:
    first, second = make_segment("r-0", seed=1), make_segment("r-1", seed=2)
    row = collate(first, second)
    assert row.position_ids.shape == (4, 1, row.num_tokens)
    expected = [*range(first.encoded_length), *range(second.encoded_length)]
    assert row.position_ids[0, 0].tolist() == expected
    num_image_tokens = 4
    assert row.position_ids[2, 0].tolist() == [100 + position + num_image_tokens for position in expected]


def test_kept_positions_come_one_before_what_they_predict() -> None:
    first, second = make_segment("r-0", seed=1, num_text=2, num_slots=1), make_segment("r-1", num_text=1)
    row = collate(first, second)
    supervised = [np.flatnonzero(s.ce_mask).tolist() + s.slot_positions.tolist() for s in (first, second)]
    expected = [*supervised[0], *(first.encoded_length + position for position in supervised[1])]
    assert row.kept_positions.tolist() == sorted(position - 1 for position in expected)
    labels = row.input_ids[0][row.kept_positions[row.supervision.ce_rows] + 1]
    assert torch.equal(labels, row.supervision.ce_labels)


def test_pixels_keep_the_order_of_the_segments_and_may_be_absent() -> None:
    first, second = make_segment("r-0", grid_thw=(1, 4, 4)), make_segment("r-1", grid_thw=(1, 2, 6))
    row = collate(first, make_segment("r-2", grid_thw=None), second)
    assert row.image_grid_thw is not None
    assert row.pixel_values is not None
    assert row.image_grid_thw.tolist() == [[1, 4, 4], [1, 2, 6]]
    assert row.pixel_values.shape[0] == 16 + 12
    assert collate(make_segment(grid_thw=None)).pixel_values is None


@pytest.mark.req("M-11")
def test_another_processor_fingerprint_is_refused() -> None:
    segment = make_segment("r-7", processor_fingerprint="other")
    with pytest.raises(DataError, match="segment r-7.*'other'.*'test-processor'"):
        collate(segment)


@pytest.mark.req("M-11")
def test_another_image_grid_than_the_producers_is_refused() -> None:
    segment = make_segment("r-7")
    pixels = make_pixels(segment)
    assert pixels is not None
    other = SegmentPixels(patches=pixels.patches, grids_thw=torch.tensor([[1, 2, 8]]))
    with pytest.raises(DataError, match="segment r-7.*image grids"):
        collate_row([segment], [other], COLLATION, ramp_positions)


@pytest.mark.req("M-11")
def test_image_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    segment = make_segment("r-7")
    token_ids = segment.token_ids.copy()
    token_ids[np.flatnonzero(token_ids == IMAGE_TOKEN_ID)[0]] = 1
    with pytest.raises(DataError, match="got 3 image tokens, expected 4"):
        collate(replace(segment, token_ids=token_ids))


@pytest.mark.req("M-11")
def test_images_without_pixels_are_refused() -> None:
    segment = make_segment("r-7", images=(ImageReference(path="a", width=1, height=1, grid_thw=(1, 4, 4)),))
    with pytest.raises(DataError, match="segment r-7"):
        collate_row([segment], [None], COLLATION, ramp_positions)


@pytest.mark.req("M-8")
def test_a_coordinate_token_in_full_vocabulary_cross_entropy_is_refused() -> None:
    segment = make_segment("r-7")
    token_ids = segment.token_ids.copy()
    token_ids[-1] = FIRST_COORD_ID + 5
    with pytest.raises(DataError, match="segment r-7.*coordinate token"):
        collate(replace(segment, token_ids=token_ids))


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no segments"):
        collate_row([], [], COLLATION, ramp_positions)
