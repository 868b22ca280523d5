"""Adds the coordinate tokens to the tokenizer files of a folder; all else in them stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import NUM_BINS, coordinate_token

TOKEN_FLAGS: Final = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def missing_tokens(tokenizer: Any) -> list[str]:
    """Return the coordinate tokens that ``tokenizer`` does not have, in bin order."""
    texts = [coordinate_token(index) for index in range(NUM_BINS)]
    return [text for text in texts if tokenizer.token_to_id(text) is None]


def first_free_id(tokenizer: Any) -> int:
    """Return the id after the largest that ``tokenizer`` uses."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def add_tokens(folder: Path, ids_by_token: dict[str, int]) -> None:
    """Write the tokens into tokenizer.json and, where they list added tokens, the files beside it.

    Raises DataError for a file that cannot be read.
    """
    _edit(folder / "tokenizer.json", lambda content: _into_tokenizer(content, ids_by_token), compact=True)
    if (folder / "tokenizer_config.json").is_file():
        _edit(folder / "tokenizer_config.json", lambda content: _into_config(content, ids_by_token))
    if (folder / "added_tokens.json").is_file():
        _edit(folder / "added_tokens.json", lambda content: content.update(ids_by_token))


def set_vocabulary_size(folder: Path, num_rows: int) -> None:
    """Write ``num_rows`` wherever config.json names the size of the vocabulary."""

    def write(content: dict[str, Any]) -> None:
        text = content.get("text_config")
        places = [entry for entry in (content, text) if isinstance(entry, dict) and "vocab_size" in entry]
        for place in places:
            place["vocab_size"] = num_rows
        if not places:
            # a config that names none means the default of its class, which is now wrong
            (text if isinstance(text, dict) else content)["vocab_size"] = num_rows

    _edit(folder / "config.json", write)


def _into_tokenizer(content: dict[str, Any], ids_by_token: dict[str, int]) -> None:
    entries = content.setdefault("added_tokens", [])
    entries += [{"id": token_id, "content": text, **TOKEN_FLAGS} for text, token_id in ids_by_token.items()]
    entries.sort(key=lambda entry: entry["id"])


def _into_config(content: dict[str, Any], ids_by_token: dict[str, int]) -> None:
    if isinstance(decoder := content.get("added_tokens_decoder"), dict):
        decoder |= {
            str(token_id): {"content": text, **TOKEN_FLAGS} for text, token_id in ids_by_token.items()
        }
    for key in ("additional_special_tokens", "extra_special_tokens"):
        # transformers reads the list as the whole of the special tokens beside the named ones
        if isinstance(listed := content.get(key), list):
            content[key] = [*listed, *(text for text in ids_by_token if text not in listed)]


def _edit(path: Path, change: Any, *, compact: bool = False) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as exc:
        raise DataError(f"{path}: not the file expected there ({exc}); download it again") from exc
    text = json.dumps(content, ensure_ascii=False, indent=None if compact else 2)
    path.write_text(text + "\n", encoding="utf-8")
