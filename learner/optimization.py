"""AdamW and its learning rate as a pure function of the optimizer
step, so that a resume needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from learner.model_parts import Part, part_of

SHARE: Final = "share_of_learning_rate"


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """``learning_rate``: its peak. ``warmup_steps``: optimizer steps
    of linear rise. ``schedule``: what follows.

    ``max_steps_course``: (from this step on, max_steps) of a run that was made longer or shorter on its way:
    each step follows the one that was in force at it; empty: ``max_steps`` throughout.
    ``max_steps``: where ``cosine`` and ``linear`` reach ``smallest_fraction`` of the peak.
    ``max_grad_norm``: clipping of the global gradient norm, 0 for none. ``part_rates``: peaks of parts of the
    model with one of their own, which follow the same course.
    """

    learning_rate: float
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int
    schedule: Literal["constant", "cosine", "linear"]
    max_steps: int
    max_steps_course: tuple[tuple[int, int], ...] = ()
    smallest_fraction: float = 0.0
    max_grad_norm: float
    part_rates: Mapping[Part, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.max_steps < 1 or self.warmup_steps < 0 or self.max_grad_norm < 0:
            raise ValueError(
                f"optimization: got learning_rate {self.learning_rate}, max_steps {self.max_steps}, "
                f"warmup_steps {self.warmup_steps}, max_grad_norm {self.max_grad_norm}; "
                "expected > 0, >= 1, >= 0, >= 0"
            )


def learning_rate_at(optimizer_step: int, settings: OptimizationSettings) -> float:
    """Return the learning rate of optimizer step ``optimizer_step``
    (from 0); past ``max_steps`` its last value.
    """
    if optimizer_step < settings.warmup_steps:
        return settings.learning_rate * (optimizer_step + 1) / settings.warmup_steps
    decay_steps = max(_max_steps_at(optimizer_step, settings) - settings.warmup_steps, 1)
    progress = min((optimizer_step - settings.warmup_steps) / decay_steps, 1.0)
    falling = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }[settings.schedule]
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (settings.smallest_fraction + (1 - settings.smallest_fraction) * falling)


def _max_steps_at(optimizer_step: int, settings: OptimizationSettings) -> int:
    in_force = [max_steps for since, max_steps in settings.max_steps_course if since <= optimizer_step]
    return in_force[-1] if in_force else settings.max_steps


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizationSettings
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; only matrices decay, not norms and biases."""
    by_share: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            rate = settings.part_rates.get(part_of(name), settings.learning_rate)
            by_share.setdefault(rate / settings.learning_rate, []).append(parameter)
    trainable = [parameter for parameters in by_share.values() for parameter in parameters]
    groups: list[dict[str, Any]] = []
    for share, parameters in by_share.items():
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, SHARE: share})
        groups.append({"params": others, "weight_decay": 0.0, SHARE: share})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        # on the CPU the fused kernel rounds elements at the end of a tensor in another way
        fused=all(parameter.device.type == "cuda" for parameter in trainable),
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group of ``optimizer`` its share of this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[SHARE]
