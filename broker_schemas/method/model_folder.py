"""Loading an ordinary Hugging Face folder: tiny models and real checkpoints take the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.adapter_folder import is_adapter, load_adapter, named_base, read_adapter, read_base
from broker_schemas.method.adapters import BaseModel, add_adapters
from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.model_fingerprint import model_fingerprint
from broker_schemas.method.prompt import load_tokenizer
from broker_schemas.method.vocabulary_width import (
    check_vocabulary_width,
    check_whole_tokens,
    vocabulary_tensors,
)

NEEDED_FILES: Final = ("config.json", "tokenizer.json", "preprocessor_config.json")
DTYPES: Final = ("float32", "bfloat16", "float16")


def resolve_model_dir(name_or_path: str | Path) -> Path:
    """Return the folder of a model: a folder here, or a hub name whose files are in the local cache.

    Nothing is downloaded. Raises DataError for anything else, or for a folder that lacks a needed file.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _cached_snapshot(str(name_or_path))
    _refuse_adapter(folder)
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"model folder {folder}: got no {', '.join(missing)}, expected a Hugging Face folder of a Qwen "
            "vision-language model; check the path, or download the checkpoint with all its files"
        )
    return folder


def load_policy(
    model_dir: str | Path,
    dtype: str = "float32",
    *,
    attn_implementation: str = "sdpa",
    base: str | Path | None = None,
) -> Any:
    """Return the model in ``model_dir`` on the CPU, in ``dtype`` and evaluation mode.

    An adapter is put on its base: ``base`` where that is the model it was trained on, else the folder that it
    names. Raises DataError for a folder that is no model, an adapter without its base, an unknown dtype, or
    coordinate tokens that lie outside the logits [M-11].
    """
    if is_adapter(Path(model_dir)):
        return _load_adapted(Path(model_dir), base, dtype, attn_implementation)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    if dtype not in DTYPES:
        raise DataError(f"model dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = resolve_model_dir(model_dir)
    check_model_folder(folder)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise DataError(
            f"model folder {folder}: cannot be loaded ({exc}); download or save it again"
        ) from exc
    return model.eval()


def base_of(folder: Path, base: str | Path | None = None) -> Path:
    """Return where the base of the adapter in ``folder`` lies: at ``base``, or where it was when trained.

    Raises DataError where it is at neither.
    """
    wanted = read_base(folder)
    for path in (base, wanted.path):
        if path is None or not Path(path).is_dir():
            continue
        found = BaseModel(path=str(path), fingerprint=model_fingerprint(Path(path)))
        if wanted.fingerprint in ("", found.fingerprint):
            return Path(path)
    given = f", and {base} is another model" if base is not None and Path(base).is_dir() else ""
    raise DataError(
        f"{folder}: an adapter without its base {wanted.path} ({wanted.fingerprint}){given}; put that model "
        "back, or give its folder as model.name_or_path"
    )


def _load_adapted(folder: Path, base: str | Path | None, dtype: str, attn_implementation: str) -> Any:
    adapter = read_adapter(folder)
    model = load_policy(base_of(folder, base), dtype, attn_implementation=attn_implementation)
    add_adapters(model, adapter.plan)
    load_adapter(model, adapter, folder)
    return model.eval()


def empty_policy(model_dir: str | Path) -> Any:
    """Return the model in ``model_dir`` without its weights, in float32 on the meta device.

    For a rank that receives them from another. Raises DataError for a folder that is no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = resolve_model_dir(model_dir)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise DataError(
            f"model folder {folder}: no model can be made of its config.json ({exc}); download it again"
        ) from exc
    return model.eval()


def check_model_folder(folder: Path) -> CoordVocabulary:
    """Return the coordinate vocabulary of a model folder, everything beside the weights' values checked.

    Only headers are read. Raises DataError for another family, missing or broken shards, a tokenizer that
    lacks or splits coordinate tokens, or embeddings and head without rows for them [M-11].
    """
    vocabulary_tensors(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = CoordVocabulary.from_token_to_id(tokenizer.token_to_id)
    check_whole_tokens(tokenizer, vocabulary, str(folder))
    check_vocabulary_width(folder, vocabulary)
    return vocabulary


def _refuse_adapter(folder: Path) -> None:
    if is_adapter(folder):
        raise DataError(
            f"model folder {folder}: got an adapter without its base {named_base(folder)!r}, expected a "
            "whole model; give the folder of the base, or merge the two: rollstream model export"
        )


def _cached_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as exc:
        raise DataError(
            f"model {name!r}: got neither a folder here nor a checkpoint in the Hugging Face cache; "
            f"check the path, download it with 'hf download {name}', or make one with 'rollstream model tiny'"
        ) from exc
