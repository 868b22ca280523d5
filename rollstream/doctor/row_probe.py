"""What one packed row keeps in memory, measured on a few layers of true width and drawn out to all of them.

What a row keeps until its loss grows in a straight line with its tokens, its patches and each kind of layer.
Above that come, one at a time, the losses of a chunk and the way back through one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from learner.packed_forward import hidden_row, position_rule_of
from rollstream.doctor.memory_meter import MemoryMeter, measure_peak
from rollstream.models.practice_learner import PracticeLearner, PracticeSettings
from rollstream.models.practice_rows import RowShape, practice_row

PROBE_ROWS: Final = 1600  # a small vocabulary: losses are counted apart
PROBE_FIRST_COORDINATE: Final = 500
PROBE_CHUNK: Final = 16  # of so few positions that the losses are never the most
SHORT: Final = RowShape(num_segments=2, image_grid=(4, 4), prompt_tokens=124, slots=8, text_tokens=8)
LONG: Final = replace(SHORT, num_segments=6)
LARGE_IMAGES: Final = replace(SHORT, image_grid=(16, 24))
# bytes of a logit in float32, its softmax, their gradients and what is copied between, as measured
LOGIT_BYTES: Final = {"bf16": 10.0, "float32": 14.4}
FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes that are there in any case, and those of each token and image patch."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_patch: float = 0.0

    def at(self, num_tokens: int, num_patches: int) -> float:
        return self.fixed + self.per_token * num_tokens + self.per_patch * num_patches

    def __add__(self, other: Line) -> Line:
        return Line(
            fixed=self.fixed + other.fixed,
            per_token=self.per_token + other.per_token,
            per_patch=self.per_patch + other.per_patch,
        )

    def __mul__(self, factor: float) -> Line:
        return Line(
            fixed=self.fixed * factor,
            per_token=self.per_token * factor,
            per_patch=self.per_patch * factor,
        )

    def __sub__(self, other: Line) -> Line:
        return self + other * -1.0


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What rows take above weights and gradients.

    ``kept``: until the loss. ``text_passing`` and ``vision_passing``: above it, on the way back through one
    layer. ``loss_per_position`` and ``loss_fixed``: of logits. ``waiting``: the head's gradient until the
    embedding's, which is the same tensor, joins it.
    """

    kept: Line
    text_passing: Line = Line()
    vision_passing: Line = Line()
    loss_per_position: float = 0.0
    loss_fixed: float = 0.0
    waiting: float = 0.0

    def kept_bytes(self, num_tokens: int, num_patches: int) -> int:
        """Return what a row of this many tokens and patches keeps until its loss."""
        return int(max(self.kept.at(num_tokens, num_patches), 0.0))

    def passing_bytes(self, num_tokens: int, num_patches: int, num_positions: int) -> int:
        """Return the most that comes on top of it: logits of ``num_positions``, or the way back."""
        losses = self.loss_fixed + self.loss_per_position * num_positions
        back = self.waiting + self.text_passing.at(num_tokens, num_patches)
        # text layers have let go of theirs by then
        seeing = self.waiting + self.vision_passing.at(num_tokens, num_patches)
        seeing -= self.kept.per_token * num_tokens
        return int(max(losses, back, seeing, 0.0))


def probe_row(config: Any, settings: PracticeSettings) -> RowCost:
    """Return the cost of a row for the model of ``config``: seconds, whatever its size."""
    settings = replace(settings, loss_chunk_positions=PROBE_CHUNK, is_drawn=False)
    text_layers, vision_layers = config.text_config.num_hidden_layers, config.vision_config.depth
    base, text_passing, _ = _measure(config, settings, 1, 1)
    deeper, _, _ = _measure(config, settings, 2, 1)
    seeing, _, vision_passing = _measure(config, settings, 1, 2)
    per_text_layer, per_vision_layer = deeper - base, seeing - base
    kept = base + per_text_layer * (text_layers - 1) + per_vision_layer * (vision_layers - 1)
    num_deepstack = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    if num_deepstack > 1:
        stacked, _, _ = _measure(config, settings, 2, 2, num_deepstack=2)
        kept = kept + (stacked - base - per_text_layer - per_vision_layer) * (num_deepstack - 1)
    return RowCost(
        kept=kept,
        text_passing=text_passing,
        vision_passing=vision_passing,
        **_loss_costs(config, settings),
    )


def _loss_costs(config: Any, settings: PracticeSettings) -> dict[str, float]:
    num_rows, value_bytes = config.text_config.vocab_size, 2 if settings.precision == "bf16" else 4
    head = num_rows * config.text_config.hidden_size
    if settings.adapter is not None or "text" in settings.frozen:
        # a vocabulary that is not trained has no gradient on its way
        head = 0
    is_tied = bool(getattr(config, "tie_word_embeddings", False) or config.text_config.tie_word_embeddings)
    return {
        "loss_per_position": LOGIT_BYTES[settings.precision] * num_rows,
        # its sum over the chunks in float32; that of one chunk comes when the logits are gone
        "loss_fixed": float(FLOAT32_BYTES * head),
        "waiting": float(value_bytes * head) if is_tied else 0.0,
    }


def _measure(
    config: Any, settings: PracticeSettings, text_layers: int, vision_layers: int, *, num_deepstack: int = 1
) -> tuple[Line, Line, Line]:
    """Return (kept, passing in text, passing in vision) of a model of so few layers."""
    small = cut_config(
        config, text_layers=text_layers, vision_layers=vision_layers, num_deepstack=num_deepstack
    )
    practice = PracticeLearner(small, settings, torch.device("cpu"))
    kept = {shape: _kept(practice, small, shape) for shape in (SHORT, LONG, LARGE_IMAGES)}
    text, vision = Line(), Line()
    if text_layers == vision_layers == 1:
        short, long = (_peak(practice, small, shape) - kept[shape] for shape in (SHORT, LONG))
        slope = max(long - short, 0) / (LONG.num_tokens - SHORT.num_tokens)
        text = Line(fixed=max(short - slope * SHORT.num_tokens, 0.0), per_token=slope)
    if vision_layers > 1 and num_deepstack == 1:
        vision = _vision_passing(practice, small)
    return _line_through(kept), text, vision


def _line_through(found: dict[RowShape, int]) -> Line:
    unknown = np.array([[1.0, shape.num_tokens, shape.num_patches] for shape in found])
    fixed, per_token, per_patch = np.linalg.solve(unknown, np.array(list(found.values()), float))
    return Line(fixed=float(fixed), per_token=float(per_token), per_patch=float(per_patch))


def _kept(practice: PracticeLearner, config: Any, shape: RowShape) -> int:
    row = practice_row(shape, config, PROBE_FIRST_COORDINATE, position_rule_of(practice.model))
    return _held_by(lambda: hidden_row(practice.model, row))


def _held_by(work: Callable[[], Any]) -> int:
    with MemoryMeter(skips_products=True) as meter:
        result = work()
        held = int(meter.live_bytes)
    del result
    return held


def _peak(practice: PracticeLearner, config: Any, shape: RowShape) -> int:
    row = practice_row(shape, config, PROBE_FIRST_COORDINATE, position_rule_of(practice.model))

    def work() -> None:
        practice.backward([row])

    # gradients are there from the second time on, as in every micro-step but the first
    measure_peak(work, practice.device, skips_products=True)
    return measure_peak(work, practice.device, skips_products=True)


def _vision_passing(practice: PracticeLearner, config: Any) -> Line:
    """Return what the vision tower alone takes above what it keeps."""
    above = []
    for shape in (SHORT, LARGE_IMAGES):
        row = practice_row(shape, config, PROBE_FIRST_COORDINATE, position_rule_of(practice.model))

        def see(row: Any = row) -> list[Any]:
            return tree_leaves(practice.model.model.get_image_features(row.pixel_values, row.image_grid_thw))

        def work(see: Any = see) -> None:
            seen = [leaf for leaf in see() if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if seen:
                torch.autograd.backward(seen, [torch.zeros_like(leaf) for leaf in seen])

        kept = _held_by(see)
        measure_peak(work, practice.device, skips_products=True)
        above.append(measure_peak(work, practice.device, skips_products=True) - kept)
    slope = max(above[1] - above[0], 0) / (LARGE_IMAGES.num_patches - SHORT.num_patches)
    return Line(fixed=max(above[0] - slope * SHORT.num_patches, 0.0), per_patch=slope)


def cut_config(config: Any, *, text_layers: int, vision_layers: int, num_deepstack: int = 1) -> Any:
    """Return ``config`` with its widths, fewer layers, a small vocabulary and matching token ids."""
    small = copy.deepcopy(config)
    text, vision = small.text_config, small.vision_config
    text.num_hidden_layers, vision.depth = text_layers, vision_layers
    text.vocab_size = PROBE_ROWS
    for name in ("layer_types", "max_window_layers"):
        if isinstance(found := getattr(text, name, None), list):
            setattr(text, name, found[:text_layers])
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = list(range(num_deepstack))
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [0]
    names = ("vision_start", "vision_end", "image", "video")
    for place, name in enumerate(names):
        setattr(small, f"{name}_token_id", place + 1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return small
