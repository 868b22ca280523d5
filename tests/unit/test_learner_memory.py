"""L-4: losses in chunks and activations computed again give the same gradients and hold less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from broker_schemas.errors import DataError, NonFiniteLoss
from learner.chunked_losses import row_losses
from learner.collation import collate_row
from learner.packed_forward import RowLoss, position_rule_of
from learner.supervision import RowSupervision
from tests.builders.learners import COLLATION, COORD_IDS, make_pixels, make_segment, tiny_model
from tests.builders.settings import loss_settings

torch.set_num_threads(1)
GRIDS = [(1, 4, 4), (1, 2, 6), None, (1, 8, 2)]


def gradients(chunk_positions: int, *, checkpointing: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of one row of several shapes and its gradients, in float64."""
    model = tiny_model(dtype=torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    segments = [make_segment(f"r-{i}", seed=i, grid_thw=grid, num_text=5 + i) for i, grid in enumerate(GRIDS)]
    segments[1] = replace(segments[1], repeat_positions=segments[1].slot_positions[:2] - 2)
    pixels = [make_pixels(segment, dtype=torch.float64) for segment in segments]
    row = collate_row(segments, pixels, replace(COLLATION, with_repeats=True), position_rule_of(model))
    settings = loss_settings(
        coord_ids=COORD_IDS,
        chunk_positions=chunk_positions,
        desc_ce_weight=0.3,
        w1_weight=2.0,
        duplicate_weight=0.7,
    )
    total, losses = RowLoss(model)(row, settings)
    (total / 3).backward()
    assert float(losses.total.detach().sum()) == pytest.approx(float(total.detach()), rel=1e-12)
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.req("L-4")
@pytest.mark.parametrize("chunk_positions", [1, 7, 40])
def test_losses_in_chunks_have_the_gradients_of_the_whole_row(chunk_positions: int) -> None:
    whole_loss, whole = gradients(0)
    loss, chunked = gradients(chunk_positions)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    assert chunked.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.req("L-4")
def test_activations_that_are_computed_again_give_the_same_gradients_to_the_bit() -> None:
    plain, again = gradients(7), gradients(7, checkpointing=True)
    assert plain[0] == again[0]
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in plain[1].items())


@pytest.mark.req("L-4")
def test_activations_that_are_computed_again_are_not_kept() -> None:
    def kept_bytes(*, checkpointing: bool) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = tiny_model()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        segment = make_segment(num_text=300)
        row = collate_row([segment], [make_pixels(segment)], COLLATION, position_rule_of(model))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            RowLoss(model)(row, loss_settings(coord_ids=COORD_IDS, chunk_positions=8))
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept_bytes(checkpointing=True) < 0.35 * kept_bytes(checkpointing=False)


class LogitsWitness(torch.nn.Linear):
    """A head that remembers the most positions it was asked for at a time."""

    most = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, hidden.shape[0])
        return super().forward(hidden)


def supervision_of(num_positions: int) -> RowSupervision:
    rows = torch.arange(num_positions)
    empty = torch.zeros(0, dtype=torch.int64)
    return RowSupervision(
        record_ids=("r-0",),
        ce_rows=rows,
        ce_labels=rows % 90,
        ce_is_desc=torch.zeros(num_positions, dtype=torch.bool),
        ce_segment=torch.zeros_like(rows),
        slot_rows=empty,
        slot_targets=empty,
        slot_in_prefix=torch.zeros(0, dtype=torch.bool),
        slot_segment=empty,
        repeat_rows=empty,
        repeat_labels=empty,
        repeat_segment=empty,
    )


@pytest.mark.req("L-4")
@pytest.mark.parametrize("num_positions", [64, 640])
def test_no_more_logits_exist_than_a_chunk_has_however_long_the_row(num_positions: int) -> None:
    head = LogitsWitness(8, 1300, bias=False)
    hidden = torch.randn(num_positions, 8, requires_grad=True)
    settings = loss_settings(coord_ids=COORD_IDS, chunk_positions=16)
    total, _ = row_losses(hidden, head, supervision_of(num_positions), settings)
    total.backward()
    assert head.most == 16
    assert hidden.grad is not None
    assert head.weight.grad is not None


def test_a_frozen_head_gets_no_gradient_and_passes_it_on() -> None:
    head = torch.nn.Linear(8, 1300, bias=False).requires_grad_(False)
    hidden = torch.randn(40, 8, requires_grad=True)
    settings = loss_settings(coord_ids=COORD_IDS, chunk_positions=16)
    row_losses(hidden, head, supervision_of(40), settings)[0].backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_faults_are_named_in_chunks_as_in_whole_rows() -> None:
    settings = loss_settings(coord_ids=COORD_IDS, chunk_positions=16)
    with pytest.raises(DataError, match="coordinate id 1199"):
        row_losses(torch.randn(40, 8), torch.nn.Linear(8, 900), supervision_of(40), settings)
    with pytest.raises(NonFiniteLoss, match="r-0"):
        row_losses(torch.full((40, 8), torch.inf), torch.nn.Linear(8, 1300), supervision_of(40), settings)
