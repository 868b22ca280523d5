"""Tokens of what follows a prefix: which of them are appended, descriptions and coordinate slots.

Owns the fragment of section 7; it must not know records, matches or losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.payload import RenderedEntries, render_entries
from broker_schemas.records.records import GroundTruthObject
from consumers.parsing import ParsedRollout
from consumers.token_bytes import backend_of, token_bytes_of


class FragmentNotEncoded(ValueError):
    """The tokenizer cannot write the fragment, or fuses its coordinates with other text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """The tokens ``ids`` (F,) of ``text``, which is the open tail of a prefix and what is appended to it.

    ``ids[:num_kept]`` hold bytes of the tail alone, any other token is appended, also where it begins in
    the tail. ``desc_mask`` (F,) marks any token that overlaps a ``desc`` value. ``slot_positions`` (S,) index
    the coordinate tokens outside descriptions, ``slot_bins`` (S,) are their bins.
    """

    text: str
    ids: NDArray[np.int32]
    num_kept: int
    desc_mask: NDArray[np.bool_]
    slot_positions: NDArray[np.int64]
    slot_bins: NDArray[np.int64]


def render_fragment(parsed: ParsedRollout, missing: Sequence[GroundTruthObject]) -> RenderedEntries:
    """Return the open tail of ``parsed``, then ``missing`` in order, then ``}``."""
    comma = ", " if missing and parsed.holds_entry else ""
    opening = parsed.open_tail + comma
    return render_entries(missing, first_number=parsed.next_object_number, opening=opening)


def encode_fragment(
    parsed: ParsedRollout, missing: Sequence[GroundTruthObject], tokenizer: Any, coord_vocab: CoordVocabulary
) -> Fragment:
    """Return the open tail and the fragment that appends ``missing``, encoded as one text.

    A tokenizer that normalises text gets the descriptions in its own normal form,
    so that spans stay exact. Raises FragmentNotEncoded.
    """
    table = token_bytes_of(tokenizer)
    rendered = render_fragment(parsed, missing)
    encoded = table.encode(rendered.text)
    if encoded is None:
        rendered = render_fragment(parsed, _normalised(missing, tokenizer))
        encoded = table.encode(rendered.text)
    if encoded is None:
        raise FragmentNotEncoded(
            f"fragment: the tokenizer does not give back {rendered.text!r:.200}, expected the same bytes; "
            "use a tokenizer without truncation that knows every byte"
        )
    ids, ends = np.asarray(encoded[0], dtype=np.int64), encoded[1]
    desc_mask = _overlap_mask(rendered, ends)
    found = [coord_vocab.bin_by_id.get(token_id, -1) for token_id in encoded[0]]
    bins = np.where(desc_mask, -1, np.asarray(found, dtype=np.int64))
    slots = np.flatnonzero(bins >= 0)
    expected = [value for item in missing for value in item.bins]
    if bins[slots].tolist() != expected:
        raise FragmentNotEncoded(
            f"fragment: got coordinate tokens {bins[slots].tolist()!r:.200}, expected {expected!r:.200}; "
            "add <|coord_0|> to <|coord_999|> to the tokenizer as special tokens"
        )
    return Fragment(
        text=rendered.text,
        ids=ids.astype(np.int32),
        num_kept=int(np.searchsorted(ends, len(parsed.open_tail), side="right")),
        desc_mask=desc_mask,
        slot_positions=slots,
        slot_bins=bins[slots],
    )


def _normalised(missing: Sequence[GroundTruthObject], tokenizer: Any) -> list[GroundTruthObject]:
    normalizer = backend_of(tokenizer).normalizer
    if normalizer is None:
        return list(missing)
    return [dataclasses.replace(item, desc=normalizer.normalize_str(item.desc)) for item in missing]


def _overlap_mask(rendered: RenderedEntries, ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark tokens (F,) that share a byte with a ``desc`` span; ``ends`` are their end offsets in bytes."""
    mask = np.zeros(len(ends), dtype=np.bool_)
    starts = np.concatenate([[0], ends[:-1]])
    is_ascii = rendered.text.isascii()
    for start, end in rendered.desc_spans:
        # Spans count characters, tokens bytes.
        first = start if is_ascii else len(rendered.text[:start].encode())
        last = end if is_ascii else len(rendered.text[:end].encode())
        mask[np.searchsorted(ends, first, side="right") : np.searchsorted(starts, last, side="left")] = True
    return mask
