"""What one packed row keeps in memory, measured on a few layers of true width and drawn out to all of them.

Memory of a row grows in a straight line with its tokens and with each kind of layer, so three small models
say what the large one needs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch

from learner.packed_forward import position_rule_of
from rollstream.doctor.memory_meter import measure_peak
from rollstream.models.practice_learner import PracticeLearner, PracticeSettings
from rollstream.models.practice_rows import RowShape, practice_row

PROBE_ROWS: Final = 1600  # a small vocabulary: losses are counted apart
PROBE_FIRST_COORDINATE: Final = 500
SHORT_SHAPE: Final = RowShape(num_segments=2, image_grid=(8, 12))
LONG_SHAPE: Final = RowShape(num_segments=6, image_grid=(8, 12))


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """Bytes that a row keeps for each of its tokens and image patches, and for whatever its length is.

    ``fixed_bytes``: gradients of weights on their way into the sums, those of the vocabulary above all.
    """

    bytes_per_token: float
    bytes_per_patch: float
    fixed_bytes: float

    def row_bytes(self, num_tokens: int, num_patches: int) -> int:
        """Return the most that a row of this many tokens and patches keeps above weights and gradients."""
        return int(self.fixed_bytes + self.bytes_per_token * num_tokens + self.bytes_per_patch * num_patches)


def probe_row(config: Any, settings: PracticeSettings) -> RowCost:
    """Return the cost of a row for the model of ``config``: seconds, whatever its size."""
    text_layers, vision_layers = config.text_config.num_hidden_layers, config.vision_config.depth
    base = _line(config, settings, 1, 1)
    deeper, seeing = _line(config, settings, 3, 1), _line(config, settings, 1, 3)
    per_text_layer = (deeper.bytes_per_token - base.bytes_per_token) / 2
    per_vision_layer = (seeing.bytes_per_token - base.bytes_per_token) / 2
    patches_per_token = SHORT_SHAPE.num_patches / SHORT_SHAPE.num_tokens
    shared = max(base.bytes_per_token - per_text_layer - per_vision_layer, 0.0)
    more_rows = config.text_config.vocab_size - PROBE_ROWS
    value_bytes = 2 if settings.precision == "bf16" else 4
    if settings.adapter is not None or "text" in settings.frozen:
        # a vocabulary that is not trained has no gradient on its way
        value_bytes = 0
    return RowCost(
        bytes_per_token=shared + text_layers * per_text_layer,
        bytes_per_patch=vision_layers * per_vision_layer / patches_per_token,
        fixed_bytes=base.bytes_at_zero + max(more_rows, 0) * config.text_config.hidden_size * value_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    bytes_per_token: float
    bytes_at_zero: float


def _line(config: Any, settings: PracticeSettings, text_layers: int, vision_layers: int) -> _Line:
    small = cut_config(config, text_layers=text_layers, vision_layers=vision_layers)
    practice = PracticeLearner(small, settings, torch.device("cpu"))
    short, long = (_peak(practice, small, shape) for shape in (SHORT_SHAPE, LONG_SHAPE))
    slope = (long - short) / (LONG_SHAPE.num_tokens - SHORT_SHAPE.num_tokens)
    return _Line(bytes_per_token=slope, bytes_at_zero=max(short - slope * SHORT_SHAPE.num_tokens, 0.0))


def _peak(practice: PracticeLearner, config: Any, shape: RowShape) -> int:
    row = practice_row(shape, config, PROBE_FIRST_COORDINATE, position_rule_of(practice.model))

    def work() -> None:
        practice.backward([row])

    # gradients are there from the second time on, as in every micro-step but the first
    measure_peak(work, practice.device, skips_products=True)
    return measure_peak(work, practice.device, skips_products=True)


def cut_config(config: Any, *, text_layers: int, vision_layers: int) -> Any:
    """Return ``config`` with its widths, fewer layers, a small vocabulary and matching token ids."""
    small = copy.deepcopy(config)
    text, vision = small.text_config, small.vision_config
    text.num_hidden_layers, vision.depth = text_layers, vision_layers
    text.vocab_size = PROBE_ROWS
    for name in ("layer_types", "max_window_layers"):
        if isinstance(found := getattr(text, name, None), list):
            setattr(text, name, found[:text_layers])
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [0]
    names = ("vision_start", "vision_end", "image", "video")
    for place, name in enumerate(names):
        setattr(small, f"{name}_token_id", place + 1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return small
