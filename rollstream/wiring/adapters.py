"""Wires adapters: what the learner trains in place of the weights, and on which layers of the model."""

from __future__ import annotations

from pathlib import Path

from broker_schemas.method.adapters import BaseModel, choose_layers, linear_layers
from broker_schemas.method.model_fingerprint import model_fingerprint
from broker_schemas.method.model_folder import empty_policy
from broker_schemas.method.prompt import PromptBuilder
from configs import RunConfig
from learner.model_parts import AdapterSettings, part_of
from rollstream.wiring import access


def adapter_settings(config: RunConfig, prompts: PromptBuilder) -> AdapterSettings | None:
    """Return the adapters that the run trains, None where it trains the weights themselves."""
    folder = access.model_dir(config)
    if config.training.lora.rank is None:
        return None
    return adapters_on(
        config,
        coordinate_ids=tuple(int(token_id) for token_id in prompts.coord_vocab.ids),
        base=BaseModel(path=str(folder.resolve()), fingerprint=model_fingerprint(folder)),
    )


def adapters_on(
    config: RunConfig, *, coordinate_ids: tuple[int, ...], base: BaseModel
) -> AdapterSettings | None:
    """Return the run's adapters on any ``base`` with coordinate tokens; None without adapters."""
    lora = config.training.lora
    if lora.rank is None:
        return None
    return AdapterSettings(
        rank=lora.rank,
        alpha=lora.alpha or 2.0 * lora.rank,
        dropout=lora.dropout,
        targets=lora.targets,
        is_dora=lora.dora,
        coordinate_ids=coordinate_ids,
        base=base,
    )


def adapted_layers(config: RunConfig, folder: Path) -> tuple[str, ...]:
    """Return the layers of the model in ``folder`` that get an adapter; none without adapters.

    No weight is read. Raises ConfigError for a target that matches nothing, DataError for no model.
    """
    if config.training.lora.rank is None:
        return ()
    names = linear_layers(empty_policy(folder))
    return choose_layers(
        [name for name in names if part_of(name) not in config.training.freeze], config.training.lora.targets
    )
