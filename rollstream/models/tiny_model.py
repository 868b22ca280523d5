"""A tiny Qwen3-VL made from a config, saved as an ordinary Hugging Face folder.

It runs through the same code as a real checkpoint; only its size and its tokenizer are small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import NUM_BINS, CoordVocabulary
from rollstream.models.tiny_tokenizer import make_tiny_tokenizer
from rollstream.models.wave_embeddings import coordinate_waves, position_waves
from rollstream.staged_folder import staged_folder

MAKER: Final = "model tiny"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny model; ``min_pixels`` and ``max_pixels`` bound the area of the resized image.

    The defaults suit scenes of 128x128 pixels: 8x8 patches, 16 image tokens.
    """

    text_hidden: int = 192
    text_intermediate: int = 512
    text_layers: int = 4
    text_heads: int = 6
    text_key_value_heads: int = 6
    vision_hidden: int = 128
    vision_intermediate: int = 512
    vision_layers: int = 3
    vision_heads: int = 4
    deepstack_layers: tuple[int, ...] = (1,)
    position_grid_side: int = 8
    patch_size: int = 16
    merge_size: int = 2
    min_pixels: int = 128 * 128
    max_pixels: int = 128 * 128

    def check(self) -> None:
        """Raise DataError for sizes that attention, rotary positions or deepstack cannot work with."""
        for whole, heads, multiple in (
            (self.text_hidden, self.text_heads, 2),
            (self.text_heads, self.text_key_value_heads, 1),
            (self.vision_hidden, self.vision_heads, 4),
        ):
            if heads < 1 or whole % (heads * multiple):
                raise DataError(
                    f"tiny model: got {whole} for {heads} heads, expected a multiple of {heads * multiple}"
                )
        too_deep = [layer for layer in self.deepstack_layers if not 0 <= layer < self.vision_layers]
        if too_deep or len(self.deepstack_layers) > self.text_layers:
            raise DataError(
                f"tiny model: got deepstack_layers {self.deepstack_layers}, expected at most "
                f"{self.text_layers} numbers from 0 to {self.vision_layers - 1}"
            )


PRESETS: Final[dict[str, TinySizes]] = {
    "scenes": TinySizes(),
    # 640x480 becomes 384x288: 24x18 patches, 108 image tokens
    "photos": TinySizes(vision_layers=4, position_grid_side=24, min_pixels=64 * 64, max_pixels=112 * 1024),
}


@dataclass(frozen=True, kw_only=True)
class TinyModelSummary:
    """What was made: the folder, its parameter count and vocabulary size."""

    folder: Path
    num_parameters: int
    vocabulary_size: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.num_parameters:,} parameters, random, and a vocabulary of "
            f"{self.vocabulary_size:,} tokens"
        )


def make_tiny_model(
    destination: str | Path,
    *,
    seed: int = 0,
    preset: Literal["scenes", "photos"] = "scenes",
    sizes: TinySizes | None = None,
    progress: Progress | None = None,
) -> TinyModelSummary:
    """Make a tiny Qwen3-VL with random weights and save it whole under ``destination``.

    ``sizes`` take the place of those of ``preset``. Equal arguments give equal bytes. A folder that this
    function made is replaced; any other that is not empty, an unknown preset, or sizes that do not fit
    together raise DataError.
    """
    if preset not in PRESETS:
        raise DataError(f"tiny model: got preset {preset!r}, expected one of {', '.join(PRESETS)}")
    sizes = sizes or PRESETS[preset]
    sizes.check()
    report = progress or (lambda message: None)
    folder = Path(destination)
    with staged_folder(folder, MAKER, {"seed": seed, "sizes": asdict(sizes)}) as staging:
        report("training the tokenizer")
        tokenizer = make_tiny_tokenizer(seed)
        report("drawing the weights")
        model = _make_model(sizes, tokenizer, seed)
        report("saving")
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)
        _save_processors(sizes, staging)
    return TinyModelSummary(
        folder=folder, num_parameters=model.num_parameters(), vocabulary_size=len(tokenizer)
    )


def tiny_config(sizes: TinySizes, tokenizer: Any) -> Any:
    """Return the Qwen3VLConfig of ``sizes`` with the ids of ``tokenizer``; embeddings are tied."""
    from transformers import Qwen3VLConfig

    head_dim = sizes.text_hidden // sizes.text_heads
    rotary_thirds = head_dim // 6
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.text_hidden,
        "intermediate_size": sizes.text_intermediate,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [head_dim // 2 - 2 * rotary_thirds, rotary_thirds, rotary_thirds],
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "patch_size": sizes.patch_size,
        "spatial_merge_size": sizes.merge_size,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.text_hidden,
        "num_position_embeddings": sizes.position_grid_side**2,
        "deepstack_visual_indexes": list(sizes.deepstack_layers),
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def _make_model(sizes: TinySizes, tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(sizes, tokenizer))
    _begin_places_with_waves(model, tokenizer, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model.to(torch.float32)


def _begin_places_with_waves(model: Any, tokenizer: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = CoordVocabulary.from_token_to_id(tokenizer.get_vocab().get).ids.tolist()
    embeddings = model.get_input_embeddings().weight
    positions = model.model.visual.pos_embed.weight
    scale = model.config.text_config.initializer_range
    with torch.no_grad():
        embeddings[rows] = coordinate_waves(NUM_BINS, embeddings.shape[1], scale, generator)
        positions.copy_(position_waves(math.isqrt(len(positions)), positions.shape[1], generator))


def _save_processors(sizes: TinySizes, folder: Path) -> None:
    # the video file is never read here; programs that load the whole processor ask for it
    shared: dict[str, Any] = {
        "size": {"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels},
        "patch_size": sizes.patch_size,
        "temporal_patch_size": 2,
        "merge_size": sizes.merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    files = {
        "preprocessor_config.json": {**shared, "image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {**shared, "video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
