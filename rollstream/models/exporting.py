"""`rollstream model export`: what a run trained, as an ordinary folder that transformers and vLLM load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from broker_schemas.errors import DataError
from broker_schemas.method.adapter_folder import (
    StoredAdapter,
    is_adapter,
    load_adapter,
    read_adapter,
    write_adapter,
)
from broker_schemas.method.adapter_merging import fold_rows, merge_adapters
from broker_schemas.method.adapters import ROWS_NAME, BaseModel, add_adapters, is_added
from broker_schemas.method.model_folder import base_of, check_model_folder, load_policy
from broker_schemas.method.processor_file import ImageBounds
from broker_schemas.method.weight_files import stored_tensors
from learner.checkpoints import save_model_folder
from learner.companions import Companions
from learner.whole_directory import numbered_directories
from rollstream.run_folder import RunFolder, read_resolved_config
from rollstream.staged_folder import check_replaceable, staged_folder

MAKER: Final = "model export"
ADAPTER_FOLDER: Final = "adapter"
STATE_FILES: Final = ("trainer_state.json", "checksums.json", "adapter_config.json")
ExportDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was written: from which checkpoint, to where, how, and how many bytes of weights."""

    checkpoint: Path
    folder: Path
    kind: Literal["model", "merged adapter", "base and adapter apart"]
    num_bytes: int

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e6:,.1f} MB of weights"
        return f"{self.folder}: {self.kind} of {self.checkpoint}, {size}"


def export_model(
    source: Path,
    destination: Path,
    *,
    step: int | None = None,
    is_apart: bool = False,
    dtype: ExportDtype = "bfloat16",
) -> ExportSummary:
    """Write the model of ``source``, a run or one of its checkpoints, to ``destination`` in ``dtype``.

    An adapter is merged into its base, or with ``is_apart`` written in peft's format to the folder
    ``adapter`` beside the base, whose rows of coordinate tokens are the trained ones. The processor has the
    image bounds of the run. ``step`` chooses a checkpoint of a run, by default its latest. Raises DataError
    for no checkpoint, an adapter without its base, or a destination that holds something else.
    """
    checkpoint, run = _find_checkpoint(source, step)
    check_replaceable(destination, MAKER)
    is_adapted = is_adapter(checkpoint)
    if is_apart and not is_adapted:
        raise DataError(f"{checkpoint}: got --apart for a whole model, expected an adapter; leave it out")
    arguments = {"checkpoint": str(checkpoint.resolve()), "dtype": dtype, "apart": is_apart}
    with staged_folder(destination, MAKER, arguments) as staging:
        if is_adapted:
            base = base_of(checkpoint, _start_model(run))
            folder = checkpoint if (checkpoint / "tokenizer.json").is_file() else base
            model = (
                _apart(checkpoint, base, staging, destination, dtype)
                if is_apart
                else _merged(checkpoint, base, dtype)
            )
        else:
            folder, model = checkpoint, load_policy(checkpoint, dtype)
        companions = Companions(folder=folder, bounds=_image_bounds(run))
        save_model_folder(model, staging, companions, dtype=getattr(torch, dtype))
        for name in STATE_FILES:
            (staging / name).unlink(missing_ok=True)
        check_model_folder(staging)
        num_bytes = sum(path.stat().st_size for path in staging.rglob("*.safetensors"))
    return ExportSummary(
        checkpoint=checkpoint,
        folder=destination,
        kind="base and adapter apart" if is_apart else "merged adapter" if is_adapted else "model",
        num_bytes=num_bytes,
    )


def _find_checkpoint(source: Path, step: int | None) -> tuple[Path, RunFolder | None]:
    """Return the folder of weights, and the run that it belongs to."""
    run = RunFolder(source)
    if not run.checkpoints_dir.is_dir():
        if step is not None:
            raise DataError(f"{source}: got --step for what is no run; expected a run's folder")
        if not source.is_dir():
            raise DataError(f"{source}: no such folder, expected a run or one of its checkpoints")
        owner = RunFolder(source.resolve().parent.parent)
        return source, owner if owner.resolved_config.is_file() else None
    found = dict(numbered_directories(run.checkpoints_dir, "checkpoint-"))
    chosen = max(found, default=None) if step is None else step
    if chosen not in found:
        known = ", ".join(str(number) for number in sorted(found)) or "none"
        raise DataError(f"{source}: no checkpoint of step {chosen}, expected one of: {known}")
    return found[chosen], run


def _start_model(run: RunFolder | None) -> str | Path | None:
    if run is None:
        return None
    named = (read_resolved_config(run.resolved_config).get("model") or {}).get("name_or_path")
    return named or run.model_dir


def _merged(checkpoint: Path, base: Path, dtype: str) -> Any:
    """Return the plain model of an adapter; a merged weight is rounded once."""
    stored = {tensor.dtype for tensor in stored_tensors(base).values()}
    model = load_policy(base, dtype if stored <= {"BF16"} else "float32")
    _add(model, read_adapter(checkpoint), checkpoint)
    merge_adapters(model)
    return model


def _apart(checkpoint: Path, base: Path, staging: Path, destination: Path, dtype: str) -> Any:
    """Write the adapter in peft's format below ``staging``; return its base with the trained rows."""
    adapter = read_adapter(checkpoint)
    is_row = {name: name.endswith(ROWS_NAME) for name in adapter.tensors}
    layers = {name: tensor for name, tensor in adapter.tensors.items() if not is_row[name]}
    rows = {name: tensor for name, tensor in adapter.tensors.items() if is_row[name]}
    folder = staging / ADAPTER_FOLDER
    folder.mkdir()
    home = BaseModel(path=str(destination.resolve()))
    write_adapter(folder, replace(adapter.plan, coordinate_ids=(), base=home), layers)
    model = load_policy(base, dtype)
    _add(model, StoredAdapter(plan=replace(adapter.plan, layers=()), tensors=rows), checkpoint)
    fold_rows(model)
    return model


def _add(model: Any, adapter: StoredAdapter, where: Path) -> None:
    add_adapters(model, adapter.plan)
    for name, parameter in model.named_parameters():
        if is_added(name):
            # what was trained in float32 is merged in float32, whatever its base is in
            parameter.data = parameter.data.float()
    load_adapter(model, adapter, where)


def _image_bounds(run: RunFolder | None) -> ImageBounds:
    """Return the run's own image bounds; none are known of a checkpoint without a run."""
    written = {} if run is None else read_resolved_config(run.resolved_config)
    image = (written.get("model") or {}).get("image") or {}
    return ImageBounds(min_pixels=image.get("min_pixels"), max_pixels=image.get("max_pixels"))
