"""Which families can be trained, and whether a folder's tokenizer, embeddings and head belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import CoordVocabulary, coordinate_token
from broker_schemas.method.weight_files import StoredTensor, stored_tensors

FAMILIES: Final = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
EMBEDDING_SUFFIX: Final = "embed_tokens.weight"
HEAD_SUFFIX: Final = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class VocabularyTensors:
    """The token embedding (rows, width) and the head, None where it is tied to the embedding."""

    embedding: StoredTensor
    head: StoredTensor | None


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder; raises DataError for another family of models."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not readable as JSON ({exc}); download the checkpoint again") from exc
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise DataError(
            f"model folder {folder}: got model_type {family!r}, expected one of {', '.join(FAMILIES)}; "
            "use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint"
        )
    return dict(config)


def vocabulary_tensors(folder: Path) -> VocabularyTensors:
    """Return the embedding and head of a model folder from the headers of its files.

    Raises DataError for missing shards, no embedding, or no head where the embeddings are not tied.
    """
    config, tensors = read_model_config(folder), stored_tensors(folder)
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDING_SUFFIX)), None)
    head = next((tensor for name, tensor in tensors.items() if name.endswith(HEAD_SUFFIX)), None)
    if embedding is None or len(embedding.shape) != 2:
        raise DataError(
            f"model folder {folder}: no {EMBEDDING_SUFFIX} of two dimensions in its safetensors; "
            "download the checkpoint again"
        )
    if head is None and not is_tied(config):
        raise DataError(
            f"model folder {folder}: no {HEAD_SUFFIX}, and config.json does not tie it to the embeddings; "
            "download the checkpoint again"
        )
    return VocabularyTensors(embedding=embedding, head=head)


def is_tied(config: dict[str, Any]) -> bool:
    """Return whether the head is the embedding, as transformers reads a Qwen vision-language config."""
    text = config.get("text_config")
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    return bool(text.get("tie_word_embeddings", False)) if isinstance(text, dict) else False


def check_vocabulary_width(folder: Path, vocabulary: CoordVocabulary) -> None:
    """Raise DataError where a coordinate token has no row in embeddings or head [M-11]."""
    tensors, largest = vocabulary_tensors(folder), int(vocabulary.ids.max())
    for tensor in (tensors.embedding, tensors.head):
        if tensor is not None and tensor.shape[0] <= largest:
            raise DataError(
                f"model folder {folder}: {tensor.name} has {tensor.shape[0]} rows, expected more than the "
                f"largest coordinate id {largest}; resize it: rollstream model adapt {folder} DST"
            )


def check_whole_tokens(tokenizer: Any, vocabulary: CoordVocabulary, where: str) -> None:
    """Raise DataError unless ``tokenizer`` writes every coordinate token as its one id [M-11]."""
    for bin_index, token_id in enumerate(vocabulary.ids.tolist()):
        text = coordinate_token(bin_index)
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        if encoded != [token_id]:
            raise DataError(
                f"{where}: the tokenizer splits {text} into {len(encoded)} tokens {encoded[:8]}, expected "
                f"the one id {token_id}; start from the stock checkpoint: rollstream model adapt SRC DST"
            )
