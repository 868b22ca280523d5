"""One optimizer step: micro-steps over packed rows, one sum of gradients, clipping, update.

The loss of a step is the sum of its segments' losses over the number of segments of all ranks, which comes
with the claim; so packing, accumulation and world size change nothing [P-9].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from broker_schemas.records.packs import Untrainable
from learner.collation import PackedRow
from learner.distributed import Ranks
from learner.losses import LossSettings, SegmentLosses, check_finite
from learner.packed_forward import RowLoss
from learner.quarantine import without_a_number
from learner.sharding import is_sharded, local_part, num_copies
from learner.trained_weights import TrainedWeights


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over segments, of one rank or of all: each over ``num_segments`` is the mean that is logged.

    ``slot_prefix`` and ``slot_tail`` are sums over slots and go with their slot counts.
    """

    total: float = 0.0
    ce: float = 0.0
    slot: float = 0.0
    soft_ce: float = 0.0
    w1: float = 0.0
    gate: float = 0.0
    repeat: float = 0.0
    slot_prefix: float = 0.0
    slot_tail: float = 0.0
    num_prefix_slots: float = 0.0
    num_tail_slots: float = 0.0
    num_segments: int = 0
    num_tokens: int = 0
    num_patches: int = 0
    num_supervised: int = 0
    num_rows: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def mean(self, name: str) -> float:
        """Return the mean over segments of one of the sums; 0 for no segments."""
        return float(getattr(self, name)) / self.num_segments if self.num_segments else 0.0

    @property
    def prefix_mean(self) -> float:
        """Mean slot loss over matched prefix slots; 0 for none."""
        return self.slot_prefix / self.num_prefix_slots if self.num_prefix_slots else 0.0

    @property
    def tail_mean(self) -> float:
        """Mean slot loss over appended slots; 0 for none."""
        return self.slot_tail / self.num_tail_slots if self.num_tail_slots else 0.0


@dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """What an update did: the global gradient norm before clipping, and the learning rate it used."""

    grad_norm: float
    learning_rate: float


def run_micro_steps(
    row_loss: RowLoss,
    rows: Iterable[PackedRow],
    *,
    num_segments_in_step: int,
    loss_settings: LossSettings,
    device: torch.device,
    broken: list[Untrainable] | None = None,
) -> LossSums:
    """Run one forward and backward per row, gradients adding up locally; return this rank's sums.

    ``num_segments_in_step`` counts the segments of all ranks. No rows: no gradient, zero sums.
    Segments whose loss is not finite are added to ``broken``; raises NonFiniteLoss naming them without it.
    The numbers stay on the device until all rows are done, so that no row waits for the one before it.
    """
    done: list[tuple[SegmentLosses, LossSums]] = []
    loss_settings = replace(loss_settings, keeps_non_finite=True)
    for row in rows:
        on_device = row.to(device)
        total, losses = row_loss(on_device, loss_settings)
        torch.autograd.backward(total / num_segments_in_step)
        done.append((losses, _counts_of(losses, row)))
    sums = LossSums()
    for (losses, _), of_row in zip(done, _sums_of(done), strict=True):
        if not math.isfinite(of_row.total):
            if broken is None:
                check_finite(losses)
            else:
                broken += without_a_number(losses)
        sums = sums + of_row
    return sums


def update_weights(
    trained: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    max_grad_norm: float,
) -> StepUpdate:
    """Sum gradients over the ranks, clip them, take the optimizer's step and clear them."""
    parameters = list(trained.parameters.values())
    ranks.sum_gradients([p for p in parameters if not is_sharded(p)])
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients, ranks)
    if 0 < max_grad_norm < norm:
        for gradient in gradients:
            local_part(gradient).mul_(max_grad_norm / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trained.after_update()
    return StepUpdate(grad_norm=norm, learning_rate=float(optimizer.param_groups[0]["lr"]))


def gradient_norm(gradients: Sequence[Tensor], ranks: Ranks) -> float:
    """Return the Euclidean norm over all gradients, each counted once however it is spread over the ranks.

    Squares are added in float64 and the result is rounded to float32, so that the same gradients have the
    same norm in any sharding.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    shared = torch.zeros_like(total)
    for gradient in gradients:
        part = torch.linalg.vector_norm(local_part(gradient), dtype=torch.float64).square()
        if is_sharded(gradient):
            shared += part / num_copies(gradient, ranks.world_size)
        else:
            total += part
    if any(is_sharded(gradient) for gradient in gradients):
        total = total + ranks.sum_number(shared)
    return float(total.sqrt().to(torch.float32))


def _counts_of(losses: SegmentLosses, row: PackedRow) -> LossSums:
    return LossSums(
        num_segments=len(losses.record_ids),
        num_tokens=row.num_tokens,
        num_patches=row.num_patches,
        num_supervised=int(row.kept_positions.numel()),
        num_rows=1,
    )


def _sums_of(rows: Sequence[tuple[SegmentLosses, LossSums]]) -> list[LossSums]:
    """Return the sums of each row, of its losses and counts, read from the device at once."""
    if not rows:
        return []
    names = [f.name for f in fields(SegmentLosses) if f.name != "record_ids"]
    summed = [torch.stack([getattr(losses, name).detach().sum() for name in names]) for losses, _ in rows]
    values = torch.stack(summed).tolist()
    return [
        replace(counts, **dict(zip(names, row, strict=True)))
        for (_, counts), row in zip(rows, values, strict=True)
    ]
