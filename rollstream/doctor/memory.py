"""`rollstream doctor --memory`: what a configuration's learner takes, computed before anything is loaded."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import ConfigError, DataError, RollstreamError
from broker_schemas.method.adapters import BaseModel
from configs import RunConfig
from rollstream.doctor.memory_plan import MemoryPlan, MemorySizes, Remedy, advice, plan_memory
from rollstream.doctor.row_probe import PROBE_FIRST_COORDINATE, RowCost, probe_row
from rollstream.models.model_shape import ModelShape, shape_of_config
from rollstream.models.named_sizes import named_config, sizes_named
from rollstream.models.practice_learner import PracticeSettings
from rollstream.wiring import access
from rollstream.wiring.adapters import adapters_on

CACHE_BYTES: Final = 256 << 20
WRITE_TRIAL_BYTES: Final = 64 << 20
DEFAULT_PIXELS: Final = 1280 * 28 * 28


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The plan of a configuration, and what it was made of."""

    plan: MemoryPlan
    shape: ModelShape
    cost: RowCost
    trained: int
    row_tokens: int
    row_patches: int
    sync_s: float
    checkpoint_s: float
    advice: tuple[str, ...]
    device_bytes: int | None


def examine_memory(
    config: RunConfig, *, size: str | None = None, gpu_gb: float | None = None
) -> MemoryReport:
    """Return the memory of the learner of ``config``; no weight of the model is read.

    ``size`` names a published size in place of the model's folder; ``gpu_gb`` a GPU's memory in place of
    the one found here. Raises ConfigError, DataError.
    """
    model_config = named_config(sizes_named(size)) if size is not None else _model_config(config)
    shape, training = shape_of_config(model_config), config.training
    cost = measure_row(config, model_config)
    tokens = training.global_max_length
    patches = row_patches(config, model_config, tokens)
    plan = plan_memory(
        memory_sizes(
            config,
            shape,
            row_bytes=cost.kept_bytes(tokens, patches),
            passing_bytes=cost.passing_bytes(tokens, patches, loss_positions(config)),
        )
    )
    device_bytes, rate = _device_bytes(config, gpu_gb), _write_rate(access.run_folder(config).path)
    remedy = Remedy(
        can_checkpoint_activations=not training.activation_checkpointing,
        can_shard=training.sharding == "none" and config.learner_world_size > 1,
        can_use_lora=training.lora.rank is None,
        row_tokens=tokens,
    )
    return MemoryReport(
        plan=plan,
        shape=shape,
        cost=cost,
        trained=trained_weights(config, shape)[0],
        row_tokens=tokens,
        row_patches=patches,
        sync_s=plan.sync / rate,
        checkpoint_s=plan.checkpoint / rate,
        advice=() if device_bytes is None else tuple(advice(plan, device_bytes, remedy)),
        device_bytes=device_bytes,
    )


def measure_row(config: RunConfig, model_config: Any) -> RowCost:
    """Return what rows of ``config`` cost with the model of ``model_config``; measured, see RowCost."""
    return probe_row(model_config, _practice(config))


def loss_positions(config: RunConfig) -> int:
    """Return how many positions of a full row have their logits at one time; half of it is supervised."""
    return config.training.loss_chunk_positions or config.training.global_max_length // 2


def _practice(config: RunConfig) -> PracticeSettings:
    first = PROBE_FIRST_COORDINATE
    return PracticeSettings(
        precision=config.precision,
        attention="segments",
        is_checkpointing_activations=config.training.activation_checkpointing,
        loss_chunk_positions=config.training.loss_chunk_positions,
        first_coordinate_id=first,
        adapter=adapters_on(config, coordinate_ids=tuple(range(first, first + 1000)), base=BaseModel()),
        frozen=config.training.freeze,
    )


def _num_sharing(config: RunConfig) -> int:
    """Return over how many ranks one copy of the model is spread."""
    sharding, num_ranks = config.training.sharding, config.learner_world_size
    if sharding == "none":
        return 1
    return num_ranks if sharding == "full" else len(config.devices.learner_gpus) or num_ranks


def memory_sizes(config: RunConfig, shape: ModelShape, *, row_bytes: int, passing_bytes: int) -> MemorySizes:
    """Return what the plan of ``config`` is made of for a model of ``shape``."""
    training = config.training
    trained, published = trained_weights(config, shape)
    return MemorySizes(
        trained=trained,
        frozen=shape.total - (0 if training.lora.rank is not None else trained),
        published=published,
        is_frozen_kept=training.lora.rank is None,
        row_bytes=row_bytes,
        passing_bytes=passing_bytes,
        outside_layers=shape.outside_layers,
        largest_layer=shape.largest_layer,
        precision=config.precision,
        num_sharing=_num_sharing(config),
        num_ranks_here=len(config.devices.learner_gpus) or config.learner_world_size,
        cache_bytes=CACHE_BYTES,
        publication_bytes_per_weight=2 if config.rollout_dtype == "bfloat16" else 4,
    )


def trained_weights(config: RunConfig, shape: ModelShape) -> tuple[int, int]:
    """Return (weights that are trained, weights that a policy version holds)."""
    training = config.training
    lora = training.lora
    if lora.rank is not None:
        adapters = shape.adapter_weights(lora.rank, lora.targets, is_dora=lora.dora, frozen=training.freeze)
        coordinates = 1000 * shape.hidden * (shape.vocabulary_rows // shape.num_rows)
        return adapters + coordinates, adapters + coordinates
    return sum(count for part, count in shape.by_part.items() if part not in training.freeze), shape.total


def row_patches(config: RunConfig, model_config: Any, row_tokens: int) -> int:
    """Return the most image patches of a full row: images of the largest size, with little text between."""
    vision = model_config.vision_config
    pixels = config.model.image.max_pixels or DEFAULT_PIXELS
    patches = pixels // vision.patch_size**2
    image_tokens = patches // vision.spatial_merge_size**2
    text_tokens = min(config.rollout_matching.max_new_tokens, 512)
    num_images = max(row_tokens // (image_tokens + text_tokens), 1)
    return int(num_images * patches)


def _model_config(config: RunConfig) -> Any:
    from transformers import AutoConfig

    if config.model.name_or_path is None and not (access.run_folder(config).path / "model").is_dir():
        from rollstream.models.run_model import make_described_model

        make_described_model(config)
    try:
        folder = access.model_dir(config)
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except RollstreamError as exc:
        raise ConfigError(
            f"{exc}; or name a published size: rollstream doctor --memory CONFIG --size 2B"
        ) from exc
    except (OSError, ValueError) as exc:
        raise DataError(f"model.name_or_path: config.json cannot be read ({exc})") from exc


def _device_bytes(config: RunConfig, gpu_gb: float | None) -> int | None:
    if gpu_gb is not None:
        return int(gpu_gb * 1e9)
    import torch

    gpus = config.devices.learner_gpus
    if gpus and torch.cuda.is_available() and max(gpus) < torch.cuda.device_count():
        return int(torch.cuda.get_device_properties(gpus[0]).total_memory)
    return None


def _write_rate(run: Path) -> float:
    """Return bytes a second that the disk of ``run`` takes, tried on a small file beside it."""
    place = run
    while not place.exists():
        place = place.parent
    if shutil.disk_usage(place).free < 4 * WRITE_TRIAL_BYTES:
        raise ConfigError(f"run.output_dir: got hardly any room on the disk of {place}; free some")
    trial = place / f".rollstream-write-trial-{time.monotonic_ns()}"
    started = time.monotonic()
    try:
        with trial.open("wb", buffering=0) as stream:
            stream.write(bytes(WRITE_TRIAL_BYTES))
            os.fsync(stream.fileno())
        return WRITE_TRIAL_BYTES / max(time.monotonic() - started, 1e-3)
    except OSError as exc:
        raise ConfigError(f"run.output_dir: {place} cannot be written ({exc.strerror})") from exc
    finally:
        trial.unlink(missing_ok=True)
