"""L-10 and P-10: packed rows cost the sum of their segments' squares, and nobody sees a neighbour."""

from __future__ import annotations

import pytest
import torch

from broker_schemas.errors import ConfigError
from learner import segment_attention
from learner.attention import choose_attention, use_attention
from learner.collation import PackedRow, collate_row
from learner.packed_forward import position_rule_of
from learner.segment_attention import SEGMENTS, segment_borders
from tests.builders.learners import COLLATION, forward_row, make_pixels, make_segment, tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
GRIDS = [(1, 4, 4), (1, 2, 6), None, (1, 8, 2)]


def model_with_segments() -> torch.nn.Module:
    model = tiny_model()
    use_attention(model, choose_attention("auto", CPU, torch.float32))
    return model


def row_of(model: object, indices: list[int]) -> PackedRow:
    chosen = [make_segment(f"r-{i}", seed=i, grid_thw=GRIDS[i], num_text=5 + 3 * i) for i in indices]
    return collate_row(chosen, [make_pixels(s) for s in chosen], COLLATION, position_rule_of(model))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (queries, keys) of every attention call of the kernel under test."""
    seen: list[tuple[int, int]] = []
    plain = segment_attention.scaled_dot_product_attention

    def noting(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(segment_attention, "scaled_dot_product_attention", noting)
    return seen


@pytest.mark.req("P-10", "L-10")
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [2]])
def test_logits_segment_by_segment_are_those_of_the_segment_alone(order: list[int]) -> None:
    model = model_with_segments()
    with torch.no_grad():
        packed = forward_row(model, row_of(model, order))
        alone = torch.cat([forward_row(model, row_of(model, [index])) for index in order])
        dense = forward_row(tiny_model(), row_of(model, order))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=0)


@pytest.mark.req("L-10")
def test_attention_costs_the_sum_of_the_segments_squares(products: list[tuple[int, int]]) -> None:
    model = model_with_segments()
    row = row_of(model, [0, 1, 2, 3])
    lengths = [int(n) for n in torch.diff(torch.tensor(segment_borders(row.position_ids[0])))]
    forward_row(model, row)
    assert products == [(length, length) for _ in range(2) for length in lengths]
    assert sum(length * length for length in lengths) < row.num_tokens**2 / 3


def test_gradients_are_those_of_the_dense_mask() -> None:
    found = []
    for model in (model_with_segments(), tiny_model()):
        forward_row(model, row_of(model, [0, 1, 2, 3])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)


def test_generation_with_padding_and_cache_is_that_of_plain_attention() -> None:
    prompts, mask = torch.randint(1, 90, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    texts = [
        model.eval().generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        for model in (model_with_segments(), tiny_model())
    ]
    assert torch.equal(*texts)


def test_borders_are_read_where_positions_begin_again() -> None:
    assert segment_borders(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [0, 3, 4, 6]
    assert segment_borders(torch.tensor([[5, 6, 0, 1]])) == [0, 2, 4]


@pytest.mark.req("L-10")
def test_the_choice_says_why() -> None:
    choice = choose_attention("auto", CPU, torch.float32)
    assert choice.kernel == SEGMENTS
    assert choice.why == "segment by segment: variable-length kernels need a GPU, the device is cpu"
    assert "as model.attention says" in choose_attention("segments", CPU, torch.float32).why
    with pytest.raises(ConfigError, match="got flash, but variable-length kernels need a GPU"):
        choose_attention("flash", CPU, torch.bfloat16)
