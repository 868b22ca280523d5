"""Reads a rollout from its token ids: the objects it holds, and the prefix that training goes on from.

Owns section 4 of the method; it must not know ground truth, records or losses.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import CoordVocabulary
from consumers.scanner import NUMBER_TOO_LARGE, ObjectEntry, Scan, opening_offset, scan_payload
from consumers.token_bytes import TokenBytes, UnspeakableText, token_bytes_of
from consumers.validation import Geometry, parse_json, validate_object

END_TOKEN: Final = "<|im_end|>"
_END_BYTES: Final = END_TOKEN.encode()
_SEPARATOR: Final = re.compile(rb"[ \t\n\r]*,[ \t\n\r]*")
_STRUCTURE: Final = b'"[]{}, \t\n\r'
_SPACE: Final = re.compile(rb"[ \t\n\r]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedObject:
    """One valid object of a rollout.

    ``bins`` are flat (x, y) pairs, or x1, y1, x2, y2. ``token_indices`` index ``ParsedRollout.prefix_ids``:
    the coordinate token of each bin, in order.
    """

    number: int
    desc: str
    geometry: Geometry
    bins: tuple[int, ...]
    token_indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRollout:
    """What a rollout says, and how far it may be kept.

    ``objects`` are the valid ones in appearance order. ``prefix_text`` is the kept text, open for appending;
    ``holds_entry`` says whether an entry is in it, valid or not. ``prefix_ids`` are its tokens up to the last
    one that holds anything but closing structure, ``open_tail`` is the structure after them: it is encoded
    together with what is appended, so that the join has the tokens that a model writes there (section 7).
    ``dropped`` maps a reason to how many objects it cost. An ``is_invalid_rollout`` has the text ``{`` that
    is not its own and no objects.
    """

    objects: tuple[ParsedObject, ...]
    prefix_ids: tuple[int, ...]
    prefix_text: str
    open_tail: str
    holds_entry: bool
    next_object_number: int
    dropped: Mapping[str, int]
    truncated: bool
    is_invalid_rollout: bool


def parse_rollout(
    token_ids: Sequence[int] | NDArray[np.integer], tokenizer: Any, coord_vocab: CoordVocabulary
) -> ParsedRollout:
    """Parse a rollout of ``token_ids`` (R,), written by ``tokenizer`` (ROLLOUT_MATCHING section 4).

    ``tokenizer`` is a ``tokenizers.Tokenizer`` or holds one as ``backend_tokenizer``. No token sequence
    raises: an empty one, prose or an id outside the vocabulary gives a rollout that says so.
    """
    table = token_bytes_of(tokenizer)
    data, ends = table.join(token_ids)
    stop = data.find(_END_BYTES)
    if stop >= 0:
        data = data[:stop]
    opening = opening_offset(data)
    if opening is None:
        return _INVALID_ROLLOUT
    scan = scan_payload(data, opening)
    kept = _Kept.of(data, scan)
    ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else [int(i) for i in token_ids]
    prefix = _cut_prefix(kept, ids, ends, table)
    return _read_objects(kept, prefix, ends, coord_vocab)


_INVALID_ROLLOUT: Final = ParsedRollout(
    objects=(),
    prefix_ids=(),
    prefix_text="{",
    open_tail="{",
    holds_entry=False,
    next_object_number=1,
    dropped=MappingProxyType({}),
    truncated=False,
    is_invalid_rollout=True,
)


@dataclass(kw_only=True, slots=True)
class _Kept:
    """The complete entries a prefix may hold: ``entries[:num_entries]``; ``dropped`` counts the others."""

    data: bytes
    scan: Scan
    num_entries: int
    dropped: Counter[str]

    @classmethod
    def of(cls, data: bytes, scan: Scan) -> _Kept:
        kept = cls(data=data, scan=scan, num_entries=len(scan.entries), dropped=Counter())
        kept.dropped["unbalanced"] = scan.num_unbalanced
        kept._cut_at(_first_break(data, scan), "malformed_json")
        kept._cut_at(_first_uncountable(scan), "key_invalid")
        return kept

    @property
    def end(self) -> int:
        """Offset just after the last kept entry, or just after the opening brace."""
        entries = self.scan.entries
        return entries[self.num_entries - 1].value_end if self.num_entries else self.scan.opening_end

    def _cut_at(self, num_entries: int, reason: str) -> None:
        if num_entries < self.num_entries:
            self.dropped[reason] += self.num_entries - num_entries
            self.num_entries = num_entries

    def drop_last(self) -> None:
        """Give up the last entry, because the tokenizer cannot write its cut."""
        self._cut_at(self.num_entries - 1, "malformed_json")


def _first_break(data: bytes, scan: Scan) -> int:
    """Return how many entries stand before the first text between entries that is no JSON."""
    end = scan.opening_end
    for index, entry in enumerate(scan.entries):
        expected = _SEPARATOR if index else _SPACE
        if not expected.fullmatch(data, end, entry.key_start) and not _joins(data, end, entry, index):
            return index
        end = entry.value_end
    return len(scan.entries)


def _joins(data: bytes, gap_start: int, entry: ObjectEntry, index: int) -> bool:
    """Whether a gap with entries that are no objects is JSON by itself."""
    gap = data[gap_start : entry.key_start].lstrip(b" \t\n\r")
    if index:
        if gap[:1] != b",":
            return False
        gap = gap[1:]
    try:
        parse_json(b"{" + gap + data[entry.key_start : entry.value_start] + b"0}")
    except ValueError:
        return False
    return True


def _first_uncountable(scan: Scan) -> int:
    offsets = [entry.key_start for entry in scan.entries if entry.number >= NUMBER_TOO_LARGE]
    offsets += [offset for number, offset in scan.bare_keys if number >= NUMBER_TOO_LARGE]
    if not offsets:
        return len(scan.entries)
    return bisect_left([entry.key_start for entry in scan.entries], min(offsets))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prefix:
    """``ids[:num_exact]`` are the rollout's own, the rest spells the cut token; ``end`` is an offset."""

    ids: tuple[int, ...]
    num_exact: int
    end: int


def _cut_prefix(kept: _Kept, ids: list[int], ends: NDArray[np.int64], table: TokenBytes) -> _Prefix:
    """Cut before the closing structure of the kept text; only a token that reaches past it is spelled anew.

    A token that ends inside the kept structure stays whole: it is what the model wrote there.
    """
    while True:
        solid_end = len(kept.data[: kept.end].rstrip(_STRUCTURE))
        if not solid_end:
            return _Prefix(ids=(), num_exact=0, end=0)
        last = int(np.searchsorted(ends, solid_end))  # the token that holds the last byte of content
        if int(ends[last]) <= kept.end:
            return _Prefix(ids=tuple(ids[: last + 1]), num_exact=last + 1, end=int(ends[last]))
        start = int(ends[last - 1]) if last else 0
        try:
            respelled = table.spell(kept.data[start:solid_end])
        except UnspeakableText:
            kept.drop_last()
            continue
        return _Prefix(ids=(*ids[:last], *respelled), num_exact=last, end=solid_end)


def _read_objects(
    kept: _Kept, prefix: _Prefix, ends: NDArray[np.int64], coord_vocab: CoordVocabulary
) -> ParsedRollout:
    entries = kept.scan.entries[: kept.num_entries]
    keys = sorted(
        [(entry.key_start, entry.number, entry) for entry in entries]
        + [(offset, number, None) for number, offset in kept.scan.bare_keys if offset < kept.end],
        key=itemgetter(0),
    )
    captures = _capture(entries, prefix.ids[: prefix.num_exact], ends, coord_vocab)
    objects: list[ParsedObject] = []
    seen: set[int] = set()
    dropped = kept.dropped
    dropped["key_invalid"] += len(kept.scan.bare_keys)
    for _, number, entry in keys:
        if entry is not None:
            indices, bins = captures[entry.key_start]
            read = validate_object(kept.data[entry.value_start : entry.value_end], number, seen, bins)
            if isinstance(read, str):
                dropped[read] += 1
            else:
                objects.append(
                    ParsedObject(
                        number=number,
                        desc=read.desc,
                        geometry=read.geometry,
                        bins=bins,
                        token_indices=indices,
                    )
                )
        seen.add(number)
    return ParsedRollout(
        objects=tuple(objects),
        prefix_ids=prefix.ids,
        prefix_text=kept.data[: kept.end].decode(errors="replace"),
        open_tail=kept.data[prefix.end : kept.end].decode(),
        holds_entry=kept.num_entries > 0,
        next_object_number=1 + max(seen, default=0),
        dropped={reason: count for reason, count in dropped.items() if count},
        truncated=kept.scan.truncated,
        is_invalid_rollout=False,
    )


def _capture(
    entries: Iterable[ObjectEntry],
    ids: Sequence[int],
    ends: NDArray[np.int64],
    coord_vocab: CoordVocabulary,
) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return, by key offset, the token indices and bins of the coordinate tokens that start in open lists."""
    bin_by_id = coord_vocab.bin_by_id
    located = [(i, bin_by_id[token_id]) for i, token_id in enumerate(ids) if token_id in bin_by_id]
    # A token starts where the one before it ends.
    starts = [int(ends[i - 1]) if i else 0 for i, _ in located]
    captures = {}
    for entry in entries:
        inside: list[tuple[int, int]] = []
        for list_start, list_end in entry.list_spans:
            inside += located[bisect_left(starts, list_start) : bisect_left(starts, list_end)]
        captures[entry.key_start] = (tuple(i for i, _ in inside), tuple(index for _, index in inside))
    return captures
