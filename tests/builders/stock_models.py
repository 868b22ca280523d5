"""Folders shaped like published checkpoints of each family: random weights, no coordinate token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from rollstream.models.tiny_tokenizer import QWEN_TOKENS, make_tiny_tokenizer

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH_SIZES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_stock_folder(
    folder: Path,
    family: Family = "qwen3_vl",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    padding_rows: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    hidden_size: int = 64,
) -> Path:
    """Write a stock-shaped folder; ``padding_rows`` None pads the vocabulary to a multiple of 128."""
    tokenizer = tokenizer or stock_tokenizer()
    num_rows = -(-len(tokenizer) // 128) * 128 if padding_rows is None else len(tokenizer) + padding_rows
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_model(family, tokenizer, num_rows, tied, hidden_size).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _write_processor(folder, family)
    if family != "qwen3_vl":
        _flatten_config(folder / "config.json")
    return folder


@cache
def stock_tokenizer() -> Any:
    """Return the tiny tokenizer with Qwen's special tokens alone."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tiny = make_tiny_tokenizer(0, num_merges=200, num_payloads=200)
    content = json.loads(tiny.backend_tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in QWEN_TOKENS]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[text for text in QWEN_TOKENS if "vision" in text or "im_" in text],
        chat_template=tiny.chat_template,
        clean_up_tokenization_spaces=False,
    )


def _make_model(family: Family, tokenizer: Any, num_rows: int, tied: bool, hidden_size: int) -> Any:
    import transformers

    text = _text_settings(family, tokenizer, num_rows, tied, hidden_size)
    vision = _vision_settings(family, hidden_size)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    ids = {
        f"{what}_token_id": tokenizer.convert_tokens_to_ids(text_token)
        for what, text_token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _text_settings(
    family: Family, tokenizer: Any, num_rows: int, tied: bool, hidden_size: int
) -> dict[str, Any]:
    num_heads, head_dim = 4, hidden_size // 4
    rope = {"mrope_interleaved": True} if family == "qwen3_vl" else {}
    return {
        "vocab_size": num_rows,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
            **rope,
        },
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _vision_settings(family: Family, hidden_size: int) -> dict[str, Any]:
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "embed_dim": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH_SIZES[family],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden_size,
    }
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    elif family == "qwen2_vl":
        vision |= {"hidden_size": hidden_size, "mlp_ratio": 2}
    else:
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    return vision


def _write_processor(folder: Path, family: Family) -> None:
    shared: dict[str, Any] = {
        "patch_size": PATCH_SIZES[family],
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    if family == "qwen3_vl":
        content = shared | {
            "size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
    else:
        content = shared | {
            "min_pixels": 56 * 56,
            "max_pixels": 112 * 112,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "processor_class": "Qwen2VLProcessor",
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def _flatten_config(path: Path) -> None:
    """Write the text settings at the top, as Qwen2-VL and Qwen2.5-VL were published."""
    content = json.loads(path.read_text())
    text = content.pop("text_config")
    text.pop("model_type", None)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps({**text, **content}))
