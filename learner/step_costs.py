"""What a step computes and holds: operations of its model, and the peak memory of a rank [L-11]."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from learner.model_parts import part_of

PEAK_FLOPS: Final = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second by a part of the device's name, as its maker states them."""
_FORWARD: Final = 2
_PASSED_ON: Final = 2
_OWN: Final = 2


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """Operations for each token, image patch and supervised position: two a weight in the forward pass, two
    to pass the gradient on, two for the weight's own gradient where it is trained.

    Products of attention scores are left out; an embedding is a look-up.
    """

    per_token: float
    per_patch: float
    per_supervised: float

    def flops(self, num_tokens: int, num_patches: int, num_supervised: int) -> float:
        """Return the operations of rows with these sizes."""
        return (
            self.per_token * num_tokens + self.per_patch * num_patches + self.per_supervised * num_supervised
        )


def work_of(model: Any) -> ModelWork:
    """Return what a step of ``model`` costs, by its weights and which of them are trained."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    named = list(model.named_parameters())
    vision = [p for name, p in named if part_of(name) != "text"]
    text = [p for name, p in named if part_of(name) == "text" and p is not embedding and p is not head]
    has_graph = any(p.requires_grad for p in vision)
    return ModelWork(
        per_token=_operations(text, passes_on=True),
        per_patch=_operations(vision, passes_on=has_graph),
        per_supervised=_operations([head], passes_on=True),
    )


def _operations(parameters: Iterable[Any], *, passes_on: bool) -> float:
    return float(
        sum(
            p.numel() * (_FORWARD + (_PASSED_ON if passes_on else 0) + (_OWN if p.requires_grad else 0))
            for p in parameters
        )
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the operations a second of ``device`` at its best, None where nobody said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes held since the last call on a GPU, or by this process so far on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
