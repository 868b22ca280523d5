"""Shapes of the published Qwen3-VL sizes with coordinate tokens, and a tiny one: configs, no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from broker_schemas.errors import DataError

ADAPTED_ROWS: Final = 152_704  # 151,669 words and 1,000 coordinate tokens, to a multiple of 64


@dataclass(frozen=True, kw_only=True)
class QwenSizes:
    """What tells one size of Qwen3-VL from another; ``num_rows`` of embedding and head."""

    hidden: int
    intermediate: int
    text_layers: int
    heads: int
    is_tied: bool
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    deepstack_layers: tuple[int, ...] = (5, 11, 17)
    key_value_heads: int = 8
    head_dim: int = 128
    num_rows: int = ADAPTED_ROWS

    def cut(self, *, text_layers: int, vision_layers: int) -> QwenSizes:
        """Return the same widths with fewer layers, as many deepstack layers as still fit."""
        deepstack = tuple(range(min(len(self.deepstack_layers), text_layers, vision_layers)))
        return replace(self, text_layers=text_layers, vision_layers=vision_layers, deepstack_layers=deepstack)


SIZES: Final[dict[str, QwenSizes]] = {
    "tiny": QwenSizes(
        hidden=192,
        intermediate=512,
        text_layers=4,
        heads=6,
        key_value_heads=6,
        head_dim=32,
        is_tied=True,
        vision_hidden=128,
        vision_intermediate=512,
        vision_layers=3,
        vision_heads=4,
        deepstack_layers=(1,),
        num_rows=1920,
    ),
    "2B": QwenSizes(hidden=2048, intermediate=6144, text_layers=28, heads=16, is_tied=True),
    "4B": QwenSizes(hidden=2560, intermediate=9728, text_layers=36, heads=32, is_tied=True),
    "8B": QwenSizes(
        hidden=4096,
        intermediate=12288,
        text_layers=36,
        heads=32,
        is_tied=False,
        vision_hidden=1152,
        vision_intermediate=4304,
        vision_layers=27,
        deepstack_layers=(8, 16, 24),
    ),
}


def sizes_named(name: str) -> QwenSizes:
    """Return the shape called ``name``; raises DataError for an unknown one."""
    if name not in SIZES:
        raise DataError(f"model size: got {name!r}, expected one of {', '.join(SIZES)}")
    return SIZES[name]


def named_config(sizes: QwenSizes) -> Any:
    """Return the Qwen3VLConfig of ``sizes``."""
    from transformers import Qwen3VLConfig

    third = sizes.head_dim // 6
    text = {
        "vocab_size": sizes.num_rows,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": [sizes.head_dim // 2 - 2 * third, third, third],
        },
        "tie_word_embeddings": sizes.is_tied,
    }
    vision = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": list(sizes.deepstack_layers),
    }
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=sizes.is_tied, **_token_ids(sizes)
    )


def first_coordinate_id(sizes: QwenSizes) -> int:
    """Return the id of bin 0: the coordinate tokens follow the words."""
    return 151_669 if sizes.num_rows == ADAPTED_ROWS else sizes.num_rows - 1001


def _token_ids(sizes: QwenSizes) -> dict[str, int]:
    if sizes.num_rows == ADAPTED_ROWS:
        first = 151_652
        ids = {"vision_start": first, "vision_end": first + 1, "image": first + 3, "video": first + 4}
    else:
        ids = {"vision_start": 1, "vision_end": 2, "image": 3, "video": 4}
    return {f"{name}_token_id": token_id for name, token_id in ids.items()}
