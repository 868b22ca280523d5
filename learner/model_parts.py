"""Vision tower, mergers and text model: which weights are whose, and which of them are trained [L-5]."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from broker_schemas.errors import ConfigError
from broker_schemas.method.adapters import (
    ROWS_NAME,
    AdapterPlan,
    BaseModel,
    add_adapters,
    choose_layers,
    linear_layers,
)

FrozenPart = Literal["vision", "merger", "text"]
Part = Literal[FrozenPart, "coordinates"]


def part_of(name: str) -> Part:
    """Return the part that the weight ``name`` of a Qwen vision-language model belongs to.

    ``coordinates`` are rows of their own for the coordinate tokens, beside the vocabulary's.
    """
    if name.endswith(ROWS_NAME):
        return "coordinates"
    pieces = name.split(".")
    if "visual" not in pieces:
        return "text"
    return "merger" if any("merger" in piece for piece in pieces) else "vision"


def freeze_parts(model: Any, frozen: Collection[FrozenPart]) -> None:
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


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Adapters to train in place of the weights of ``base``; ``targets`` are ends of layers' names.

    See AdapterPlan for the rest.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    coordinate_ids: tuple[int, ...]
    dropout: float
    is_dora: bool
    base: BaseModel


def adapt_model(
    model: Any, settings: AdapterSettings, frozen: Collection[FrozenPart], *, seed: int
) -> AdapterPlan:
    """Put adapters on the layers of ``model`` that are not of ``frozen`` parts; return what was added.

    Raises ConfigError for a target that matches nothing.
    """
    names = [name for name in linear_layers(model) if part_of(name) not in frozen]
    plan = AdapterPlan(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        is_dora=settings.is_dora,
        layers=choose_layers(names, settings.targets),
        coordinate_ids=settings.coordinate_ids,
        base=settings.base,
    )
    add_adapters(model, plan, seed=seed)
    return plan


def check_part_rates(trained_names: Collection[str], rates: Collection[Part]) -> None:
    """Raise ConfigError for a learning rate of a part of which nothing is trained."""
    trained = {part_of(name) for name in trained_names}
    idle = sorted(set(rates) - trained - {"coordinates"})
    if idle:
        raise ConfigError(
            f"training.learning_rates: got {', '.join(idle)}, of which nothing is trained; take it out, or "
            "name layers of it in training.lora.targets"
        )
