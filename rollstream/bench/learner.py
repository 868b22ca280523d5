"""`rollstream bench learner`: the learner's step on random weights against a plain transformers loop.

Both train the same segments in the same run, a step of the one after a step of the other, so that whatever
else the machine does meets both; medians are told. The plain loop takes one padded batch of them at a time,
as a trainer without packing does, with transformers' own loss over all positions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from broker_schemas.errors import ConfigError
from broker_schemas.method.adapters import BaseModel
from learner.attention import Wanted
from learner.collation import PackedRow
from learner.model_parts import AdapterSettings
from learner.packed_forward import position_rule_of
from learner.sharding import Precision
from learner.step_costs import peak_flops, work_of
from rollstream.doctor.memory_meter import measure_peak
from rollstream.doctor.row_probe import PROBE_FIRST_COORDINATE, probe_row
from rollstream.models.model_shape import shape_of_config
from rollstream.models.named_sizes import QwenSizes, first_coordinate_id, named_config, sizes_named
from rollstream.models.practice_learner import PracticeLearner, PracticeSettings
from rollstream.models.practice_rows import RowShape, practice_row
from rollstream.wiring.room import free_host_bytes

CPU_LAYERS: Final = 2
WAYS: Final[dict[str, Wanted]] = {"auto": "auto", "flash": "flash", "segments": "segments"}
LORA_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LearnerBench:
    """What was measured; ``cut_to`` tells of layers left out; no utilisation where the peak is unknown."""

    size: str
    device: str
    cut_to: str | None
    precision: str
    weights: int
    num_tokens: int
    step_s: float
    plain_step_s: float
    tokens_per_s: float
    flops_per_s: float
    utilisation: float | None
    row_bytes: int
    plain_row_bytes: int
    predicted_row_bytes: int
    loss: float

    @property
    def speed_up(self) -> float:
        """How many times faster than the plain loop."""
        return self.plain_step_s / self.step_s

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "speed_up": self.speed_up}

    def render(self) -> str:
        """Return the lines that are printed."""
        share = "unknown peak" if self.utilisation is None else f"{100 * self.utilisation:.1f} % of its peak"
        cut = "" if self.cut_to is None else f", cut to {self.cut_to}: times are of those layers"
        return "\n".join(
            (
                f"{self.size} on {self.device} in {self.precision}{cut}",
                f"{self.weights / 1e9:.3f}e9 weights",
                f"step {self.step_s:.3f} s, {self.tokens_per_s:.0f} tokens a second, "
                f"{self.flops_per_s / 1e12:.3f} TFLOP a second ({share})",
                f"plain transformers loop {self.plain_step_s:.3f} s: {self.speed_up:.2f} times as fast",
                f"peak above weights, gradients and moments {self.row_bytes / 1e9:.3f} GB, plain "
                f"{self.plain_row_bytes / 1e9:.3f} GB, predicted {self.predicted_row_bytes / 1e9:.3f} GB",
            )
        )


def run_learner_bench(
    *,
    size: str = "tiny",
    precision: str | None = None,
    is_checkpointing_activations: bool = False,
    attention: Wanted = "auto",
    lora_rank: int | None = None,
    num_segments: int = 8,
    num_steps: int = 5,
    quick: bool = False,
) -> LearnerBench:
    """Measure one rank; a CPU gets a few layers of true width, a GPU the whole model.

    With ``lora_rank`` both loops train the same adapters and coordinate rows.
    Raises ConfigError where the model needs more memory than there is, before it is made.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes, cut_to = _sizes_for(size, device)
    config = named_config(sizes)
    default: Precision = "bf16" if device.type == "cuda" else "float32"
    chosen: Precision = "bf16" if precision == "bf16" else "float32" if precision else default
    weights = shape_of_config(config).total
    _check_room(weights, chosen, device, is_adapted=lora_rank is not None)
    settings = PracticeSettings(
        precision=chosen,
        is_checkpointing_activations=is_checkpointing_activations,
        first_coordinate_id=first_coordinate_id(sizes),
        attention=attention,
        adapter=_adapters(lora_rank, first_coordinate_id(sizes)),
    )
    shape = RowShape(num_segments=2 if quick else num_segments, image_grid=(12, 16))
    measured = _measure(PracticeLearner(config, settings, device), config, shape, 2 if quick else num_steps)
    peak = peak_flops(device)
    return LearnerBench(
        size=size,
        device=_device_name(device),
        cut_to=cut_to,
        precision=chosen,
        weights=weights,
        num_tokens=shape.num_tokens,
        tokens_per_s=shape.num_tokens / measured.step_s,
        flops_per_s=measured.flops / measured.step_s,
        utilisation=None if peak is None else measured.flops / measured.step_s / peak,
        predicted_row_bytes=_predicted_row_bytes(config, settings, shape, lora_rank),
        step_s=measured.step_s,
        plain_step_s=measured.plain_step_s,
        row_bytes=measured.row_bytes,
        plain_row_bytes=measured.plain_row_bytes,
        loss=measured.loss,
    )


def _sizes_for(size: str, device: torch.device) -> tuple[QwenSizes, str | None]:
    sizes = sizes_named(size)
    if device.type != "cpu" or size == "tiny":
        return sizes, None
    cut = sizes.cut(text_layers=CPU_LAYERS, vision_layers=CPU_LAYERS)
    return cut, f"{CPU_LAYERS} text and {CPU_LAYERS} vision layers"


def _predicted_row_bytes(
    config: Any, settings: PracticeSettings, shape: RowShape, lora_rank: int | None
) -> int:
    narrow = replace(
        settings,
        first_coordinate_id=PROBE_FIRST_COORDINATE,
        adapter=_adapters(lora_rank, PROBE_FIRST_COORDINATE),
    )
    cost, size = probe_row(config, narrow), (shape.num_tokens, shape.num_patches)
    positions = min(settings.loss_chunk_positions, shape.num_supervised)
    return cost.kept_bytes(*size) + cost.passing_bytes(*size, positions)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    loss: float
    flops: float
    step_s: float
    plain_step_s: float
    row_bytes: int
    plain_row_bytes: int


def _measure(practice: PracticeLearner, config: Any, shape: RowShape, num_steps: int) -> _Measured:
    device, first = practice.device, practice.settings.first_coordinate_id
    row = practice_row(shape, config, first, position_rule_of(practice.model))
    loss = practice.step([row])
    plain = _PlainLoop(practice, row, shape, config)
    plain.step()
    step_s, plain_step_s = _medians_s((lambda: practice.step([row]), plain.step), num_steps, device)
    practice.backward([row])
    row_bytes = measure_peak(lambda: practice.backward([row]), device)
    practice.optimizer.zero_grad(set_to_none=True)
    plain.backward()
    plain_row_bytes = measure_peak(plain.backward, device)
    return _Measured(
        loss=loss,
        flops=work_of(practice.model).flops(shape.num_tokens, shape.num_patches, shape.num_supervised),
        step_s=step_s,
        plain_step_s=plain_step_s,
        row_bytes=row_bytes,
        plain_row_bytes=plain_row_bytes,
    )


class _PlainLoop:
    """transformers as one would write it: a batch, labels, the model's own loss, the same optimizer."""

    def __init__(self, practice: PracticeLearner, row: PackedRow, shape: RowShape, config: Any) -> None:
        self._practice = practice
        self._inputs = _as_batch(row, shape, config, practice.device)
        self._attention = practice.model.config.text_config._attn_implementation

    def backward(self) -> float:
        model = self._practice.model
        model.set_attn_implementation("sdpa")
        loss = model(**self._inputs, use_cache=False).loss
        torch.autograd.backward(loss)
        model.set_attn_implementation({"text_config": self._attention})
        return float(loss.detach())

    def step(self) -> float:
        loss = self.backward()
        practice = self._practice
        practice.optimizer.step()
        practice.optimizer.zero_grad(set_to_none=True)
        practice.trained.after_update()
        return loss


def _as_batch(row: PackedRow, shape: RowShape, config: Any, device: torch.device) -> dict[str, Any]:
    ids = row.input_ids.view(shape.num_segments, shape.segment_tokens)
    labels = ids.clone()
    labels[:, : shape.image_tokens + 2 + shape.prompt_tokens] = -100
    on_device: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "labels": labels,
        "pixel_values": row.pixel_values,
        "image_grid_thw": row.image_grid_thw,
    }
    return {name: tensor.to(device) for name, tensor in on_device.items()}


def _medians_s(works: Sequence[Callable[[], Any]], num_times: int, device: torch.device) -> tuple[float, ...]:
    """Return the median seconds of each of ``works``, which take turns; who begins changes each time."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(num_times):
        for place in range(len(works)):
            index = (turn + place) % len(works)
            started = time.perf_counter()
            works[index]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[index].append(time.perf_counter() - started)
    return tuple(statistics.median(times) for times in taken)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _adapters(rank: int | None, first: int) -> AdapterSettings | None:
    if rank is None:
        return None
    return AdapterSettings(
        rank=rank,
        alpha=2.0 * rank,
        targets=LORA_TARGETS,
        coordinate_ids=tuple(range(first, first + 1000)),
        dropout=0.0,
        is_dora=False,
        base=BaseModel(path="random weights", fingerprint=""),
    )


def _check_room(weights: int, precision: str, device: torch.device, *, is_adapted: bool) -> None:
    # made in float32 before they are turned into what computes
    wanted = weights * (4 if is_adapted else 18 if precision == "bf16" else 16)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    if wanted > free:
        raise ConfigError(
            f"bench learner: got {free / 1e9:.1f} GB free, expected {wanted / 1e9:.1f} GB for weights, "
            "gradients and moments; choose a smaller --size"
        )
