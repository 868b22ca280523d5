"""Vision tower, mergers and text model: which weights are whose, and which of them are trained [L-5]."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from broker_schemas.errors import ConfigError

Part = Literal["vision", "merger", "text"]


def part_of(name: str) -> Part:
    """Return the part that the weight ``name`` of a Qwen vision-language model belongs to."""
    pieces = name.split(".")
    if "visual" not in pieces:
        return "text"
    return "merger" if any("merger" in piece for piece in pieces) else "vision"


def freeze_parts(model: Any, frozen: Collection[Part]) -> None:
    """Train no weight of these parts: they get no gradient, moments or float32 copy, and no graph.

    Raises ConfigError for a part that the model does not have.
    """
    found = {part_of(name) for name, _ in model.named_parameters()}
    missing = sorted(set(frozen) - found)
    if missing:
        raise ConfigError(
            f"training.freeze: got {', '.join(missing)}, of which this model has no weights, "
            f"expected some of {', '.join(sorted(found))}"
        )
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
