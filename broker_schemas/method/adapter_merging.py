"""Turns an adapted model into the plain one that computes the same."""

from __future__ import annotations

from typing import Any

from broker_schemas.method.adapters import ROWS_NAME, SwappedRows, coordinate_ids_of


def fold_rows(model: Any) -> None:
    """Write coordinate rows over the rows of embedding and head that they stand for, in place."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = coordinate_ids_of(embedding)
    with torch.no_grad():
        for module in (embedding, head):
            rows = getattr(module, ROWS_NAME, None)
            if rows is not None:
                module.weight[list(ids)] = rows.to(module.weight.dtype)
    for module in (embedding, head):
        if hasattr(module, ROWS_NAME):
            delattr(module, ROWS_NAME)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), SwappedRows):
                del module._forward_hooks[key]


def merge_adapters(model: Any) -> None:
    """Add every adapter of ``model`` to the layer under it, in float32 with one rounding, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        dtype = module.base_layer.weight.dtype
        module.float()
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.base_layer.to(dtype))
    if hasattr(model, "peft_config"):
        del model.peft_config
    fold_rows(model)
