"""The bytes behind each token id: what a tokenizer writes for one token, without its neighbours.

Owns the table id -> bytes and the way back for a short piece; it must not know rollouts, JSON or coordinates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

PieceWriter: TypeAlias = Callable[[str], str | bytes]

_BYTE_FALLBACK: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnspeakableText(ValueError):
    """Bytes that no sequence of this tokenizer's ordinary tokens can write."""


def backend_of(tokenizer: Any) -> Any:
    """Return the ``tokenizers.Tokenizer`` itself, also from what wraps it as ``backend_tokenizer``."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def token_bytes_of(tokenizer: Any) -> TokenBytes:
    """Return the byte table of ``tokenizer``; built once for each tokenizer and number of tokens."""
    backend = backend_of(tokenizer)
    return _build_once(backend, backend.get_vocab_size(with_added_tokens=True))


class TokenBytes:
    """Byte pieces of one tokenizer.

    ``pieces[i]`` are the bytes of token id ``i``; ids without a token write nothing. A token of a
    byte-level BPE is read through its byte alphabet, any other through its decoder's replacements; an added
    token is its literal text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = max((*vocab.values(), *added), default=-1) + 1
        write = _piece_writer(tokenizer)
        pieces = [b""] * (self.num_ids + 1)
        for text, token_id in vocab.items():
            pieces[token_id] = _as_bytes(write(text))
        for token_id, text in added.items():
            pieces[token_id] = text.encode()
        self.pieces = pieces
        self._added_ids = frozenset(added)
        self._lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))

    def join(self, token_ids: Sequence[int] | NDArray[np.integer]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the concatenated bytes and, for each token, the offset just after its piece.

        Shape (N,) in, (N,) out. An id outside the vocabulary writes nothing. No tokens give ``b""``.
        """
        known = self._known(token_ids)
        pieces = self.pieces
        data = b"".join([pieces[token_id] for token_id in known.tolist()])
        return data, np.cumsum(self._lengths[known])

    def text(self, token_ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Return what the tokens write, for people to read; bytes that are no UTF-8 are replaced."""
        return self.join(token_ids)[0].decode(errors="replace")

    def _known(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        try:
            ids = np.asarray(token_ids, dtype=np.int64)
        except OverflowError:
            ids = np.asarray([i if 0 <= i < self.num_ids else -1 for i in token_ids], dtype=np.int64)
        outside = (ids < 0) | (ids >= self.num_ids)
        return np.where(outside, self.num_ids, ids) if outside.any() else ids

    def encode(self, text: str) -> tuple[list[int], NDArray[np.int64]] | None:
        """Return the ids of ``text`` and their end offsets in bytes, or None where they write other bytes.

        A normaliser, a truncation or an unknown token make a
        tokenizer write something else than it was given.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        data, ends = self.join(ids)
        return (ids, ends) if data == text.encode() else None

    def spell(self, data: bytes) -> list[int]:
        """Return token ids that write exactly ``data``, which need not be whole characters.

        The tokenizer's own encoding where it is exact, else the fewest ordinary tokens. ``b""`` gives no ids.
        Raises UnspeakableText where no sequence writes it.
        """
        try:
            encoded = self.encode(data.decode())
        except UnicodeDecodeError:
            encoded = None
        return encoded[0] if encoded is not None else self._fewest_tokens(data)

    def _fewest_tokens(self, data: bytes) -> list[int]:
        fewest: list[list[int] | None] = [[]] + [None] * len(data)
        for end in range(1, len(data) + 1):
            for start in range(max(0, end - self._longest_piece), end):
                before, token_id = fewest[start], self._id_by_piece.get(data[start:end])
                if before is None or token_id is None:
                    continue
                best = fewest[end]
                if best is None or len(before) + 1 < len(best):
                    fewest[end] = [*before, token_id]
        spelled = fewest[-1]
        if spelled is None:
            raise UnspeakableText(
                f"tokenizer: no ordinary tokens write {data!r:.80}, expected a token for every byte; "
                "use a byte-level or byte-fallback tokenizer"
            )
        return spelled

    @cached_property
    def _id_by_piece(self) -> dict[bytes, int]:
        ordinary = (i for i in range(self.num_ids - 1, -1, -1) if i not in self._added_ids)
        return {self.pieces[token_id]: token_id for token_id in ordinary if self.pieces[token_id]}

    @cached_property
    def _longest_piece(self) -> int:
        return max(map(len, self._id_by_piece), default=0)


@lru_cache(maxsize=8)
def _build_once(tokenizer: Any, num_tokens: int) -> TokenBytes:
    # num_tokens is part of the key alone: tokens added later must not meet a table without them.
    return TokenBytes(tokenizer)


def _as_bytes(piece: str | bytes) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _piece_writer(tokenizer: Any) -> PieceWriter:
    decoders = _components(tokenizer.decoder, "decoders")
    names = {part["type"] for part in decoders + _components(tokenizer.pre_tokenizer, "pretokenizers")}
    if "ByteLevel" in names:
        return _byte_level_writer()
    replacements = [_replacement(part) for part in decoders]

    def write(text: str) -> str | bytes:
        written: str | bytes = text
        for replace in replacements:
            if isinstance(written, str):
                written = replace(written)
        return written

    return write


def _components(part: Any, list_name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return list(state[list_name]) if state["type"] == "Sequence" else [state]


def _replacement(part: dict[str, Any]) -> PieceWriter:
    """What one component of a decoder does to a token by itself, the ends of a text left out."""
    kind = part["type"]
    if kind == "Replace":
        pattern, content = part["pattern"], part["content"]
        if "String" in pattern:
            return lambda text: text.replace(pattern["String"], content)
        regex = re.compile(pattern["Regex"])
        return lambda text: regex.sub(lambda _: content, text)
    if kind == "Metaspace":
        return lambda text: text.replace(part["replacement"], " ")
    if kind == "BPEDecoder":
        return lambda text: text.replace(part["suffix"], " ")
    if kind == "WordPiece":
        prefix = part["prefix"]
        return lambda text: text[len(prefix) :] if text.startswith(prefix) else f" {text}"
    if kind == "ByteFallback":
        return _byte_or_text
    return lambda text: text


def _byte_or_text(text: str) -> str | bytes:
    found = _BYTE_FALLBACK.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text


def _byte_level_writer() -> PieceWriter:
    """Read a token through the alphabet of byte-level BPE.

    Printable Latin-1 bytes stand for themselves, the 68 others for the characters from U+0100 on, in byte
    order (Radford et al. 2019, GPT-2). A token with any other character is its own text.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    byte_by_character = {chr(byte): byte for byte in printable}
    byte_by_character |= {chr(0x100 + index): byte for index, byte in enumerate(others)}

    def write(text: str) -> str | bytes:
        try:
            return bytes([byte_by_character[character] for character in text])
        except KeyError:
            return text

    return write
