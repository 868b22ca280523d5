"""P-10 on a tiny Qwen3-VL with images: a segment's logits are the same alone and in any pack."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from broker_schemas.records.records import MatchedSegment
from learner.collation import PackedRow, collate_row
from learner.packed_forward import position_rule_of
from tests.builders.learners import COLLATION, forward_row, make_pixels, make_segment, tiny_model

torch.set_num_threads(1)
GRIDS = [(1, 4, 4), (1, 2, 6), None, (1, 8, 2)]


def segments_of_several_shapes() -> list[MatchedSegment]:
    return [
        make_segment(f"r-{index}", seed=index, grid_thw=grid, num_text=5 + 3 * index)
        for index, grid in enumerate(GRIDS)
    ]


def collate(model: object, segments: Sequence[MatchedSegment]) -> PackedRow:
    return collate_row(segments, [make_pixels(s) for s in segments], COLLATION, position_rule_of(model))


@pytest.mark.req("P-10")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3]])
def test_logits_of_a_segment_are_the_same_alone_and_in_any_pack(order: list[int], attention: str) -> None:
    model, shapes = tiny_model(attention=attention), segments_of_several_shapes()
    segments = [shapes[index] for index in order]
    with torch.no_grad():
        packed = forward_row(model, collate(model, segments))
        alone = torch.cat([forward_row(model, collate(model, [segment])) for segment in segments])
    assert packed.shape == alone.shape
    # kernels may sum in another order for another number of rows; a leak moves logits by 1e-2 and more
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.req("P-10")
def test_without_isolation_the_second_segment_sees_the_first() -> None:
    """The hazard itself: with one running text position row, attention crosses and the logits differ."""
    model, segments = tiny_model(), segments_of_several_shapes()[:2]
    row = collate(model, segments)
    leaking = row.position_ids.clone()
    leaking[0, 0] = torch.arange(row.num_tokens)
    leaking_row = PackedRow(**{**vars(row), "position_ids": leaking})
    with torch.no_grad():
        isolated, crossed = forward_row(model, row), forward_row(model, leaking_row)
    first_length = int((row.kept_positions < segments[0].encoded_length).sum())
    torch.testing.assert_close(isolated[:first_length], crossed[:first_length], atol=1e-5, rtol=0)
    assert (isolated[first_length:] - crossed[first_length:]).abs().max() > 1e-3


@pytest.mark.req("P-10")
def test_changing_one_segment_leaves_the_logits_of_the_others() -> None:
    model, segments = tiny_model(), segments_of_several_shapes()
    other = make_segment("r-other", seed=77, grid_thw=(1, 4, 8), num_text=20)
    with torch.no_grad():
        before = forward_row(model, collate(model, [segments[0], segments[1]]))
        after = forward_row(model, collate(model, [other, segments[1]]))
    num_rows = len(collate(model, [segments[1]]).kept_positions)
    torch.testing.assert_close(before[-num_rows:], after[-num_rows:], atol=1e-5, rtol=0)


def test_only_positions_that_predict_something_get_logits() -> None:
    model, segment = tiny_model(), make_segment(num_text=6, num_slots=4)
    row = collate(model, [segment])
    with torch.no_grad():
        kept = forward_row(model, row)
        everything = model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            pixel_values=row.pixel_values,
            image_grid_thw=row.image_grid_thw,
            use_cache=False,
        ).logits[0]
    assert kept.shape[0] == 10
    torch.testing.assert_close(kept, everything[row.kept_positions], atol=1e-5, rtol=0)


def test_images_reach_the_logits() -> None:
    model, segment = tiny_model(), make_segment()
    row = collate(model, [segment])
    assert row.pixel_values is not None
    darker = PackedRow(**{**vars(row), "pixel_values": row.pixel_values - 3})
    with torch.no_grad():
        assert (forward_row(model, row) - forward_row(model, darker)).abs().max() > 1e-4


@pytest.mark.req("P-10")
def test_a_packed_segment_has_the_logits_that_generation_would_compute() -> None:
    """The model's own call, as `generate` makes it: one padded-free sequence and no positions given."""
    model, segments = tiny_model(), segments_of_several_shapes()
    with torch.no_grad():
        packed = forward_row(model, collate(model, segments))
    first = 0
    for segment in segments:
        row = collate(model, [segment])
        with torch.no_grad():
            own = model(
                input_ids=row.input_ids,
                mm_token_type_ids=(row.input_ids == COLLATION.image_token_id).int(),
                pixel_values=row.pixel_values,
                image_grid_thw=row.image_grid_thw,
                attention_mask=torch.ones_like(row.input_ids),
            ).logits[0, row.kept_positions]
        torch.testing.assert_close(packed[first : first + len(own)], own, atol=1e-5, rtol=0)
        first += len(own)
    assert first == len(packed)
