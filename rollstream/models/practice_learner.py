"""A learner rank's model and optimizer on random weights, put together as the learner does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from learner.attention import choose_attention, use_attention
from learner.collation import PackedRow
from learner.losses import LossSettings
from learner.model_parts import AdapterSettings, FrozenPart, adapt_model, freeze_parts
from learner.optimization import OptimizationSettings, build_optimizer
from learner.packed_forward import RowLoss
from learner.sharding import Precision
from learner.train_step import run_micro_steps
from learner.trained_weights import TrainedWeights

# what a step costs depends on none of these
PRACTICE_OPTIMIZATION = OptimizationSettings(
    learning_rate=1e-4,
    weight_decay=0.0,
    warmup_steps=0,
    schedule="constant",
    max_steps=1000,
    max_grad_norm=1.0,
)


@dataclass(frozen=True, kw_only=True)
class PracticeSettings:
    """The keys of `training` and `model` that change what a step costs.

    Unless ``is_drawn``, the model's matrices are zeros.
    """

    precision: Precision
    attention: Any = "auto"
    is_checkpointing_activations: bool = False
    loss_chunk_positions: int = 256
    first_coordinate_id: int = 0
    adapter: AdapterSettings | None = None
    frozen: tuple[FrozenPart, ...] = ()
    is_drawn: bool = True

    @property
    def losses(self) -> LossSettings:
        first = self.first_coordinate_id
        return LossSettings(
            coord_ids=tuple(range(first, first + 1000)),
            target_sigma=2.0,
            target_truncate=None,
            temperature_coord=1.0,
            soft_ce_weight=1.0,
            w1_weight=1.0,
            gate_weight=1.0,
            desc_ce_weight=1.0,
            duplicate_weight=0.0,
            chunk_positions=self.loss_chunk_positions,
        )


class PracticeLearner:
    """One rank without ranks around it: ``step`` trains rows, ``model`` is what computes."""

    def __init__(self, config: Any, settings: PracticeSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.model = random_model(config, device, is_drawn=settings.is_drawn).train()
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        use_attention(self.model, choose_attention(settings.attention, device, dtype))
        if settings.is_checkpointing_activations:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze_parts(self.model, settings.frozen)
        plan = None
        if settings.adapter is not None:
            plan = adapt_model(self.model, settings.adapter, settings.frozen, seed=0)
        self._row_loss = RowLoss(self.model)
        self.trained = TrainedWeights(self.model, settings.precision, plan)
        self.optimizer = build_optimizer(self.trained.parameters.items(), PRACTICE_OPTIMIZATION)

    def backward(self, rows: Sequence[PackedRow]) -> float:
        """Add the gradients of ``rows`` up and return their loss."""
        num_segments = sum(row.supervision.num_segments for row in rows)
        return run_micro_steps(
            self._row_loss,
            rows,
            num_segments_in_step=num_segments,
            loss_settings=self.settings.losses,
            device=self.device,
        ).mean("total")

    def step(self, rows: Sequence[PackedRow]) -> float:
        """Train one optimizer step on ``rows`` and return its loss."""
        loss = self.backward(rows)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.after_update()
        return loss


def random_model(config: Any, device: torch.device, *, is_drawn: bool = True) -> Any:
    """Return the float32 model of ``config`` on ``device`` with small random weights, always the same.

    Unless ``is_drawn``, its matrices are zeros, which are there at once.
    """
    from transformers import AutoModelForImageTextToText

    # drawn where they stay: the usual initialisation of 8B weights takes minutes on a CPU
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if parameter.ndim == 0 else 1.0)
            elif not is_drawn:
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    restore_buffers(model, config, device)
    return model


def restore_buffers(model: Any, config: Any, device: torch.device) -> None:
    """Compute again what ``to_empty`` left without values: the frequencies of rotary positions."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "inv_freq" or name == "original_inv_freq":
                with torch.device(device):
                    fresh = _fresh_like(module, config)
                module.register_buffer(name, getattr(fresh, name).to(buffer.dtype), persistent=False)


def _fresh_like(module: Any, config: Any) -> Any:
    inner = getattr(module, "config", None)
    if inner is not None:
        return type(module)(inner)
    vision = config.vision_config
    return type(module)(vision.hidden_size // vision.num_heads // 2)
