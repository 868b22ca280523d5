"""Adapters whose every weight was moved, on a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from broker_schemas.method.adapter_folder import write_adapter
from broker_schemas.method.adapters import AdapterPlan, BaseModel, add_adapters, is_added, linear_layers
from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.model_fingerprint import model_fingerprint
from broker_schemas.method.model_folder import load_policy
from broker_schemas.method.prompt import load_tokenizer


def write_trained(
    folder: Path, base: Path, *, seed: int, ends: tuple[str, ...] = ("q_proj", "down_proj")
) -> Any:
    """Write an adapter on ``base`` whose every weight was moved; return the model that it makes."""
    model = load_policy(base)
    ids = CoordVocabulary.from_token_to_id(load_tokenizer(base).token_to_id).ids.tolist()
    layers = tuple(name for name in linear_layers(model) if name.endswith(ends))
    plan = AdapterPlan(
        rank=2,
        alpha=4.0,
        layers=layers,
        coordinate_ids=tuple(ids),
        base=BaseModel(path=str(base), fingerprint=model_fingerprint(base)),
    )
    add_adapters(model, plan)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True)
    write_adapter(folder, plan, {name: p.detach() for name, p in model.named_parameters() if is_added(name)})
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(5, 400, 7)[None]).logits)
