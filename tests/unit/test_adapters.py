"""L-5: adapters on a frozen base, coordinate rows beside them, train as a plain peft loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from broker_schemas.errors import ConfigError
from broker_schemas.method.adapters import AdapterPlan, add_adapters, choose_layers, linear_layers
from learner.collation import PackedRow, collate_row
from learner.model_parts import adapt_model, check_part_rates, part_of
from learner.optimization import build_optimizer
from learner.packed_forward import RowLoss, position_rule_of
from learner.trained_weights import TrainedWeights
from tests.builders.learners import (
    COLLATION,
    COORD_IDS,
    adapter_settings,
    make_pixels,
    make_segment,
    tiny_model,
)
from tests.builders.settings import loss_settings, optimization_settings

torch.set_num_threads(1)


def row_of(model: Any) -> PackedRow:
    grids = [(1, 4, 4), (1, 2, 6), None]
    segments = [make_segment(f"r-{i}", seed=i, grid_thw=grid, num_text=5 + i) for i, grid in enumerate(grids)]
    return collate_row(segments, [make_pixels(item) for item in segments], COLLATION, position_rule_of(model))


def loss_of(model: Any, *, chunk_positions: int = 7) -> torch.Tensor:
    settings = loss_settings(coord_ids=COORD_IDS, chunk_positions=chunk_positions)
    return RowLoss(model)(row_of(model), settings)[0]


def untied_model() -> Any:
    model = tiny_model()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head + 0.01)
    return model


def unlike_the_base(model: Any) -> None:
    """Move every trained weight, so that none of them has an adapter's harmless first value."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.req("L-5")
@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("make_model", [tiny_model, untied_model])
def test_an_adapter_that_was_just_made_has_the_losses_of_its_base(make_model: Any, is_dora: bool) -> None:
    expected = loss_of(make_model()).item()
    model = make_model()
    adapt_model(model, adapter_settings(is_dora=is_dora), (), seed=0)
    assert loss_of(model).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.req("L-5")
def test_an_adapter_run_moves_as_a_plain_peft_loop_does() -> None:
    import peft

    # given peft's own model, its coordinate rows trained by peft's own way
    plain = tiny_model()
    layers = [name for name in linear_layers(plain) if name.rpartition(".")[2] in adapter_settings().targets]
    config = peft.LoraConfig(
        r=4, lora_alpha=8.0, target_modules=layers, trainable_token_indices={"embed_tokens": list(COORD_IDS)}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(plain, config)
    ours = tiny_model()
    adapt_model(ours, adapter_settings(), (), seed=0)
    trained = TrainedWeights(ours)
    reference = dict(wrapped.base_model.model.named_parameters())
    for name, parameter in trained.parameters.items():
        if part_of(name) != "coordinates":
            parameter.data.copy_(reference[name])
    # when
    optimization = optimization_settings(learning_rate=1e-2)
    mine = build_optimizer(trained.parameters.items(), optimization)
    theirs = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=1e-8
    )
    losses: list[tuple[float, float]] = []
    for _ in range(4):
        pair = (loss_of(ours), loss_of(wrapped.base_model.model, chunk_positions=0))
        for loss, optimizer in zip(pair, (mine, theirs), strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append((float(pair[0].detach()), float(pair[1].detach())))
    # then
    assert losses[-1][0] < losses[0][0]
    assert [ours for ours, _ in losses] == pytest.approx([theirs for _, theirs in losses], rel=1e-4)


@pytest.mark.req("L-5", "L-4")
@pytest.mark.parametrize("make_model", [tiny_model, untied_model])
def test_chunks_and_activations_computed_again_change_no_gradient_of_an_adapter(make_model: Any) -> None:
    def gradients(chunk_positions: int, *, again: bool) -> dict[str, torch.Tensor]:
        model = make_model().double()
        adapt_model(model, adapter_settings(), (), seed=0)
        unlike_the_base(model)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, chunk_positions=chunk_positions).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, other = gradients(0, again=False), gradients(3, again=True)
    assert {part_of(name) for name in plain} == {"vision", "merger", "text", "coordinates"}
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.req("L-5")
def test_rows_of_their_own_have_the_gradients_of_the_rows_they_replace() -> None:
    model, whole = untied_model().double(), untied_model().double()
    add_adapters(model, AdapterPlan(rank=1, alpha=1.0, layers=(), coordinate_ids=COORD_IDS))
    for each in (model, whole):
        loss_of(each).backward()
    for own, replaced in (
        (model.get_input_embeddings(), whole.get_input_embeddings()),
        (model.get_output_embeddings(), whole.get_output_embeddings()),
    ):
        assert own.weight.grad is None
        expected = replaced.weight.grad[list(COORD_IDS)]
        torch.testing.assert_close(own.coordinate_rows.grad, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.req("L-5")
def test_only_adapters_and_rows_are_trained_and_frozen_parts_get_none() -> None:
    model = tiny_model()
    targets = ("q_proj", "linear_fc1")
    adapt_model(model, adapter_settings(targets=targets), ("vision",), seed=0)
    trained = TrainedWeights(model)
    assert {part_of(name) for name in trained.parameters} == {"merger", "text", "coordinates"}
    optimizer = build_optimizer(trained.parameters.items(), optimization_settings())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("coordinate_rows") for name in trained.parameters)


@pytest.mark.req("L-5")
@pytest.mark.parametrize(
    "targets, frozen, named",
    [
        (("q_proj", "w_pack"), (), "got w_pack"),
        (("norm1",), (), "got norm1"),
        (("qkv",), ("vision",), "got qkv"),
    ],
)
def test_targets_that_match_nothing_are_refused_by_name(
    targets: tuple[str, ...], frozen: tuple[Any, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"training.lora.targets: {named}, which match no linear layer"):
        adapt_model(tiny_model(), adapter_settings(targets=targets), frozen, seed=0)


@pytest.mark.req("L-5")
def test_a_learning_rate_of_a_part_without_adapters_is_refused() -> None:
    model = tiny_model()
    adapt_model(model, adapter_settings(targets=("q_proj",)), (), seed=0)
    names = TrainedWeights(model).parameters
    check_part_rates(names, ["text", "coordinates"])
    with pytest.raises(ConfigError, match="got merger, vision, of which nothing is trained"):
        check_part_rates(names, ["vision", "merger", "text"])


@pytest.mark.req("L-5")
def test_a_target_is_an_end_of_a_name_and_not_of_a_word() -> None:
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.new_q_proj",
        "model.visual.attn.proj",
    ]
    assert choose_layers(names, ["q_proj"]) == (names[0],)
    assert choose_layers(names, ["attn.proj"]) == (names[2],)
