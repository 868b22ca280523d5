"""P-9: one step's gradient is the same for any packing, accumulation and world size (two gloo ranks)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from learner.collation import PackedRow, collate_row
from learner.distributed import Ranks
from learner.packed_forward import RowLoss, position_rule_of
from learner.train_step import run_micro_steps
from tests.builders.learners import COLLATION, COORD_IDS, make_pixels, make_segment, tiny_model
from tests.builders.settings import loss_settings
from tests.distributed.rank_processes import meet, run_ranks

GRIDS = [(1, 4, 4), (1, 2, 6), None, (1, 4, 4), (1, 8, 2), (1, 2, 2)]
LOSS = loss_settings(coord_ids=COORD_IDS, w1_weight=5.0)
ONE_ROW = [[[0, 1, 2, 3, 4, 5]]]
ONE_EACH = [[[0], [1], [2], [3], [4], [5]]]
UNEVEN = [[[5, 0], [3], [1, 4, 2]]]
TWO_RANKS = [[[0, 1], [2]], [[3, 4, 5]]]
TWO_RANKS_UNEVEN = [[[5, 4, 3, 2, 1], [0]], []]


def step_gradient(rows_of_rank: Sequence[Sequence[int]], ranks: Ranks) -> torch.Tensor:
    """Return the flat float64 gradient of the step whose segments on this rank lie in these rows."""
    model = tiny_model(dtype=torch.float64)
    segments = [make_segment(f"r-{i}", seed=i, grid_thw=grid, num_text=2 + i) for i, grid in enumerate(GRIDS)]

    def collate(indices: Sequence[int]) -> PackedRow:
        chosen = [segments[index] for index in indices]
        pixels = [make_pixels(segment, dtype=torch.float64) for segment in chosen]
        return collate_row(chosen, pixels, COLLATION, position_rule_of(model))

    sums = run_micro_steps(
        RowLoss(model),
        (collate(indices) for indices in rows_of_rank),
        num_segments_in_step=len(segments),
        loss_settings=LOSS,
        device=ranks.device,
    )
    assert sums.num_segments == sum(len(indices) for indices in rows_of_rank)
    parameters = list(model.parameters())
    ranks.sum_gradients(parameters)
    return torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])


def single_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, device=torch.device("cpu"), stall_timeout_s=60)


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    gradient = step_gradient(ONE_ROW[0], single_rank())
    assert gradient.norm() > 1
    return gradient


@pytest.mark.req("P-9")
@pytest.mark.parametrize("layout", [ONE_EACH, UNEVEN], ids=["one segment a row", "uneven and reordered"])
def test_packing_and_accumulation_do_not_change_the_gradient(
    layout: list[list[list[int]]], reference: torch.Tensor
) -> None:
    torch.testing.assert_close(step_gradient(layout[0], single_rank()), reference, atol=1e-6, rtol=0)


def _two_ranks(rank: int, folder: Path) -> None:
    for name, layout in (("even", TWO_RANKS), ("uneven", TWO_RANKS_UNEVEN)):
        ranks = meet(folder, name, rank)
        torch.save(step_gradient(layout[rank], ranks), folder / f"{name}-{rank}.pt")
        ranks.barrier(what="end of the test")
        ranks.close()


@pytest.mark.slow
@pytest.mark.req("P-9", "Q-9", "S-7")
def test_two_gloo_ranks_get_the_gradient_of_one_even_when_one_has_no_pack(
    reference: torch.Tensor, tmp_path: Path
) -> None:
    assert run_ranks(_two_ranks, tmp_path) == [0, 0]
    for name in ("even", "uneven"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert torch.equal(first, second), "ranks would drift apart"
        torch.testing.assert_close(first, reference, atol=1e-6, rtol=0)


@pytest.mark.req("P-9")
def test_a_mean_over_rows_instead_of_segments_would_be_seen(reference: torch.Tensor) -> None:
    """The test has teeth: dividing by another count gives another gradient."""
    model = tiny_model(dtype=torch.float64)
    segment = make_segment("r-0", seed=0)
    row = collate_row(
        [segment], [make_pixels(segment, dtype=torch.float64)], COLLATION, position_rule_of(model)
    )
    gradients = []
    for num_segments in (1, 2):
        model.zero_grad()
        run_micro_steps(
            RowLoss(model),
            [row],
            num_segments_in_step=num_segments,
            loss_settings=LOSS,
            device=torch.device("cpu"),
        )
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], 2 * gradients[1])
