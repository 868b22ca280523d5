"""How many weights a model has and where, from its configuration: made without memory, on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker_schemas.method.adapters import choose_layers

PARTS: Final = ("vision", "merger", "text")
HEAD: Final = "lm_head"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Weights by part; ``vocabulary`` are those of embedding and head, a part of ``by_part["text"]``.

    ``vocabulary_rows`` counts rows of embedding and head together, once where they are tied. ``linears``:
    (name, inputs, outputs) of every linear layer, which adapters are made for. ``largest_layer`` and
    ``outside_layers``: weights of one repeated block, and those of none.
    """

    by_part: dict[str, int]
    vocabulary: int
    vocabulary_rows: int
    hidden: int
    num_rows: int
    linears: tuple[tuple[str, int, int], ...]
    largest_layer: int = 0
    outside_layers: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_part.values())

    def adapter_weights(
        self, rank: int, targets: Sequence[str], *, is_dora: bool, frozen: Collection[str] = ()
    ) -> int:
        """Return the weights of adapters of ``rank`` on the layers of ``targets`` outside of frozen parts.

        Raises ConfigError for a target that matches none.
        """
        names = [name for name, _, _ in self.linears if part_of(name) not in frozen and name != HEAD]
        chosen = set(choose_layers(names, targets))
        hit = [linear for linear in self.linears if linear[0] in chosen]
        extra = sum(outputs for _, _, outputs in hit) if is_dora else 0
        return sum(rank * (inputs + outputs) for _, inputs, outputs in hit) + extra


def part_of(name: str) -> str:
    """Return which part of a Qwen vision-language model a weight called ``name`` belongs to."""
    if "visual." not in name:
        return "text"
    return "merger" if "merger" in name else "vision"


def shape_of_config(config: Any) -> ModelShape:
    """Return the shape of the model that transformers makes of ``config``."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.modeling_layers import GradientCheckpointingLayer

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    by_part = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        by_part[part_of(name)] += parameter.numel()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    num_tables = 1 if head is embedding else 2
    return ModelShape(
        by_part=by_part,
        vocabulary=num_tables * embedding.numel(),
        vocabulary_rows=num_tables * embedding.shape[0],
        hidden=int(embedding.shape[1]),
        num_rows=int(embedding.shape[0]),
        linears=tuple(
            (name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ),
        largest_layer=max(layers, default=0),
        outside_layers=sum(by_part.values()) - sum(layers),
    )
