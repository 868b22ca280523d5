"""What fits where: the learner of one configuration at the published sizes, on 1 to 8 GPUs, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from configs import RunConfig
from rollstream.doctor.memory import loss_positions, measure_row, memory_sizes, row_patches
from rollstream.doctor.memory_plan import GB, MemorySizes, plan_memory
from rollstream.models.model_shape import shape_of_config
from rollstream.models.named_sizes import named_config, sizes_named

PUBLISHED: Final = ("2B", "4B", "8B")
NUM_GPUS: Final = (1, 2, 4, 8)
GPU_GB: Final = (24, 48, 80)


@dataclass(frozen=True, kw_only=True)
class FittingRow:
    """What a full packed row takes at one size: ``kept`` until its loss, ``passing`` at most on top of it.

    Both to the 10 MB that are shown, so that the rest of a line follows from what stands in it.
    """

    size: str
    kept: int
    passing: int


def measure_rows(config: RunConfig, sizes: Sequence[str] = PUBLISHED) -> list[FittingRow]:
    """Return the cost of a full row at each size: a minute or more, all on the CPU."""
    rows = []
    for size in sizes:
        model_config = named_config(sizes_named(size))
        tokens = config.training.global_max_length
        patches = row_patches(config, model_config, tokens)
        cost = measure_row(config, model_config)
        rows.append(
            FittingRow(
                size=size,
                kept=round(cost.kept_bytes(tokens, patches), -7),
                passing=round(cost.passing_bytes(tokens, patches, loss_positions(config)), -7),
            )
        )
    return rows


def render_fitting(config: RunConfig, rows: Sequence[FittingRow]) -> str:
    """Return gigabytes of a rank, and in brackets the smallest of ``GPU_GB`` that holds it, – for none.

    More than one GPU: the model is spread over all of them (`training.sharding: full`).
    """
    tokens = config.training.global_max_length
    lora = config.training.lora.rank
    way = "all weights" if lora is None else f"LoRA rank {lora}"
    heads = ["1 GPU", *(f"{number} GPUs" for number in NUM_GPUS[1:])]
    lines = [
        f"| {way} | row of {tokens:,} tokens | on top | {' | '.join(heads)} |",
        f"|---|{'---|' * (2 + len(heads))}",
    ]
    for row in rows:
        shape = shape_of_config(named_config(sizes_named(row.size)))
        sizes = memory_sizes(config, shape, row_bytes=row.kept, passing_bytes=row.passing)
        cells = [_cell(sizes, number) for number in NUM_GPUS]
        gigabytes = f"{row.kept / GB:.2f} | {row.passing / GB:.2f}"
        lines.append(f"| {row.size} | {gigabytes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(sizes: MemorySizes, num_gpus: int) -> str:
    plan = plan_memory(replace(sizes, num_sharing=num_gpus))
    holding = [str(gigabytes) for gigabytes in GPU_GB if plan.fits(int(gigabytes * GB))]
    return f"{plan.rank / GB:.1f} ({holding[0] if holding else '–'})"
