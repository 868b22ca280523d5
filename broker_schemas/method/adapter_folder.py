"""An adapter as a folder: peft's two files, the coordinate rows in a third, and which base they belong to.

The rows lie apart because rollout servers refuse a peft file with weights that they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.adapters import (
    ROWS_NAME,
    AdapterPlan,
    BaseModel,
    is_added,
    state_name,
    stored_name,
)
from broker_schemas.method.weight_files import read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ROWS_FILE: Final = "coordinate_rows.safetensors"
BASE_FINGERPRINT: Final = "base_fingerprint"
_IDS: Final = "coordinate_ids"
_REMEDY: Final = "take another, or remove it"


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter read from a folder; ``tensors`` under the names of the adapted model's state."""

    plan: AdapterPlan
    tensors: dict[str, Tensor]


def is_adapter(folder: Path) -> bool:
    """Return whether ``folder`` holds an adapter and no model beside it."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def named_base(folder: Path) -> str:
    """Return the name or folder of the base that an adapter folder speaks of; raises DataError for none."""
    path = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise DataError(f"{folder / CONFIG_FILE}: names no base model, expected base_model_name_or_path")
    return path


def read_base(folder: Path) -> BaseModel:
    """Return the base that an adapter folder names; raises DataError where it names none, or is broken."""
    path = named_base(folder)
    header, _ = read_header(folder / WEIGHTS_FILE)
    notes = header.get("__metadata__") or {}
    return BaseModel(path=path, fingerprint=str(notes.get(BASE_FINGERPRINT, "")))


def check_base(wanted: BaseModel, given: BaseModel, where: Path) -> None:
    """Raise DataError where the adapter in ``where`` was trained on another model than the one given.

    A base is known by its files, wherever they lie; one that nobody took a digest of passes.
    """
    if wanted.fingerprint and given.fingerprint and wanted.fingerprint != given.fingerprint:
        raise DataError(
            f"{where}: an adapter of {wanted.path} ({wanted.fingerprint}), got {given.path} "
            f"({given.fingerprint}) as its base; give the model that it was trained on"
        )


def write_adapter(folder: Path, plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, by their names in the adapted model's state, into ``folder``; raises OSError."""
    import torch
    from safetensors.torch import save_file

    weights = {
        stored_name(name): tensor.contiguous()
        for name, tensor in tensors.items()
        if not name.endswith(ROWS_NAME)
    }
    rows = {name: tensor.contiguous() for name, tensor in tensors.items() if name.endswith(ROWS_NAME)}
    # not in the configuration, where peft warns of keys that it does not know; and no second note beside it,
    # as safetensors writes them in any order and equal adapters must be equal files
    save_file(weights, folder / WEIGHTS_FILE, metadata={BASE_FINGERPRINT: plan.base.fingerprint})
    if rows:
        save_file({**rows, _IDS: torch.tensor(sorted(plan.coordinate_ids))}, folder / ROWS_FILE)
    body = {
        "peft_type": "LORA",
        "base_model_name_or_path": plan.base.path,
        "inference_mode": True,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "use_dora": plan.is_dora,
        "target_modules": list(plan.layers),
        "bias": "none",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> StoredAdapter:
    """Return the adapter in ``folder``; raises DataError naming the file that is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    base, config = read_base(folder), _read_config(folder)
    try:
        found = load_file(folder / WEIGHTS_FILE)
        rows = load_file(folder / ROWS_FILE) if (folder / ROWS_FILE).is_file() else {}
        ids = tuple(rows.pop(_IDS).tolist()) if rows else ()
        plan = AdapterPlan(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config["lora_dropout"]),
            is_dora=bool(config.get("use_dora", False)),
            layers=tuple(str(name) for name in config["target_modules"]),
            coordinate_ids=ids,
            base=base,
        )
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as exc:
        raise DataError(f"adapter folder {folder}: cannot be read ({exc!r}); {_REMEDY}") from exc
    return StoredAdapter(
        plan=plan, tensors={**{state_name(name): value for name, value in found.items()}, **rows}
    )


def load_adapter(model: Any, adapter: StoredAdapter, where: Path) -> None:
    """Copy the adapter's weights into ``model``, which has been given its plan; raises DataError."""
    import torch

    own = {name: p for name, p in model.named_parameters() if is_added(name)}
    wrong = sorted(own.keys() ^ adapter.tensors.keys()) or sorted(
        name for name, tensor in adapter.tensors.items() if tensor.shape != own[name].shape
    )
    if wrong:
        raise DataError(
            f"{where}: an adapter of another model, {len(wrong)} weights do not fit, first {wrong[0]}; "
            "give the base that it was trained on"
        )
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            own[name].copy_(tensor)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not readable as JSON ({exc}); {_REMEDY}") from exc
    if not isinstance(found, dict):
        raise DataError(f"{path}: got {type(found).__name__}, expected a map; {_REMEDY}")
    return found
