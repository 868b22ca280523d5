"""One pass over the bytes of a rollout: where its entries, their values and their coordinate lists lie.

Owns structure alone (braces, brackets, strings, keys at depth 1); it
must not know tokens or what an object means.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

JSON_SPACE: Final = b" \t\n\r"
MAX_NUMBER_DIGITS: Final = 1000
NUMBER_TOO_LARGE: Final = 10**MAX_NUMBER_DIGITS

_BRACE_OPEN, _BRACE_CLOSE, _BRACKET_OPEN, _BRACKET_CLOSE = b"{}[]"
# No possessive quantifiers: in Python 3.11.2 a group repeated so keeps what its own lookahead forbids.
# Nothing here can match the same bytes in two ways, so going back costs no more than the bytes once again.
_STRING: Final = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# Strings joined by commas are one lexeme, because only a string before a colon matters and it always comes
# first. A quote that starts no closed string matches alone: everything after it lies inside that string.
_LEXEME: Final = re.compile(
    rb"%b(?:[ \t\n\r]*,[ \t\n\r]*%b(?![ \t\n\r]*:))*|[\"{}\[\]]" % (_STRING, _STRING), re.DOTALL
)
_KEY: Final = re.compile(rb"(%b)[ \t\n\r]*:[ \t\n\r]*" % _STRING, re.DOTALL)
_GEOMETRY_LIST: Final = re.compile(rb'"(?:bbox_2d|poly)"[ \t\n\r]*:[ \t\n\r]*(?=\[)')
# An entry as the prompt asks for it, which most are: taken whole, without looking at its lexemes one by one.
_PLAIN_STRING: Final = rb'"[^"\\]*"'
_PLAIN_LIST: Final = rb"\[(?:%b(?:, %b)*|\[%b, %b\](?:, \[%b, %b\])*)\]" % ((_PLAIN_STRING,) * 6)
_PLAIN_ENTRY: Final = re.compile(
    rb'(?:, )?("object_([0-9]{1,9})": )(\{"desc": %b, "(?:bbox_2d|poly)": (%b)\})'
    % (_PLAIN_STRING, _PLAIN_LIST)
)
_OBJECT_KEY: Final = re.compile(rb"object_([0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectEntry:
    """One ``"object_N": {…}`` at depth 1, as offsets in bytes.

    The key starts at ``key_start``, the value is ``value_start:value_end`` with both braces. ``list_spans``
    are the ``bbox_2d`` and ``poly`` lists directly inside the value, from ``[`` to just after ``]``.
    """

    number: int
    key_start: int
    value_start: int
    value_end: int
    list_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What one pass found.

    ``opening_end`` is the offset just after the first ``{``. ``entries`` are the complete objects before
    the first mismatched bracket, in order. ``bare_keys`` are (number, offset) of ``object_N`` keys whose
    value is no ``{…}``. ``num_unbalanced`` counts the object with the first mismatch and every object
    opened after it. ``truncated``: depth, brackets or a string were open at the end.
    """

    opening_end: int
    entries: tuple[ObjectEntry, ...]
    bare_keys: tuple[tuple[int, int], ...]
    num_unbalanced: int
    truncated: bool


def opening_offset(data: bytes) -> int | None:
    """Return the offset of the ``{`` that is the first byte after JSON white space, else None."""
    offset = len(data) - len(data.lstrip(JSON_SPACE))
    return offset if data[offset : offset + 1] == b"{" else None


def scan_payload(data: bytes, opening: int) -> Scan:
    """Scan from the ``{`` at offset ``opening`` until depth returns to 0 or the bytes end."""
    machine = _Machine(data)
    machine.take(opening, opening + 1)
    for found in _LEXEME.finditer(data, machine.take_plain_entries(opening + 1)):
        if not machine.take(found.start(), found.end()):
            break
    return machine.result(opening)


class _Machine:
    """The state of the pass; ``take`` returns False where scanning ends."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._open: list[int] = []
        self._entries: list[ObjectEntry] = []
        self._bare_keys: list[tuple[int, int]] = []
        self._key: tuple[int, int, int] | None = None  # number, key start, offset of its brace
        self._list_start = -1
        self._list_spans: list[tuple[int, int]] = []
        self._num_opened = 0
        self._mismatched = self._bracket_left_open = False

    def take(self, start: int, end: int) -> bool:
        byte = self._data[start]
        if end - start > 1:
            self._string(start)
        elif byte in (_BRACE_OPEN, _BRACKET_OPEN):
            self._open.append(byte)
        elif byte == _BRACKET_CLOSE:
            self._close_bracket(end)
        elif byte == _BRACE_CLOSE:
            self._close_brace(end)
        else:
            return False  # inside a string to the end, and so inside the brace that opened it
        return bool(self._open)

    def take_plain_entries(self, start: int) -> int:
        """Take the entries from ``start``, at depth 1, that are written plainly; return where they end."""
        while found := _PLAIN_ENTRY.match(self._data, start):
            start = found.end()
            self._num_opened += 1
            self._entries.append(
                ObjectEntry(
                    number=int(found[2]),
                    key_start=found.start(1),
                    value_start=found.start(3),
                    value_end=start,
                    list_spans=(found.span(4),),
                )
            )
        return start

    def _string(self, start: int) -> None:
        depth = len(self._open)
        if depth == 2 and self._key is not None:
            found = _GEOMETRY_LIST.match(self._data, start)
            if found:
                self._list_start = found.end()
        elif depth == 1:
            self._key_at_depth_1(start)

    def _key_at_depth_1(self, start: int) -> None:
        found = _KEY.match(self._data, start)
        number = None if found is None else _object_number(found[1][1:-1])
        if found is None or number is None:
            return
        value_start = found.end()
        value = self._data[value_start : value_start + 1]
        if value == b"{":
            self._key = (number, start, value_start)
            self._list_spans = []
            self._num_opened += 1
        elif value:
            self._bare_keys.append((number, start))

    def _close_bracket(self, end: int) -> None:
        if self._open[-1] != _BRACKET_OPEN:
            self._mismatched = True
            return
        self._open.pop()
        if len(self._open) == 2 and self._list_start >= 0:
            self._list_spans.append((self._list_start, end))
            self._list_start = -1

    def _close_brace(self, end: int) -> None:
        while self._open[-1] == _BRACKET_OPEN:
            self._open.pop()
            self._mismatched = self._bracket_left_open = True
        self._open.pop()
        if len(self._open) != 1 or self._key is None:
            return
        if not self._mismatched:
            number, key_start, value_start = self._key
            self._entries.append(
                ObjectEntry(
                    number=number,
                    key_start=key_start,
                    value_start=value_start,
                    value_end=end,
                    list_spans=tuple(self._list_spans),
                )
            )
        self._key, self._list_start = None, -1

    def result(self, opening: int) -> Scan:
        return Scan(
            opening_end=opening + 1,
            entries=tuple(self._entries),
            bare_keys=tuple(self._bare_keys),
            num_unbalanced=self._num_opened - len(self._entries) if self._mismatched else 0,
            truncated=bool(self._open) or self._bracket_left_open,
        )


def _object_number(key: bytes) -> int | None:
    """Return N of the key ``object_N`` (the bytes between its quotes), None for any other key.

    A number of more than MAX_NUMBER_DIGITS digits is NUMBER_TOO_LARGE: no prefix may hold such a key,
    because no number could be counted on from it.
    """
    if b"\\" in key:
        try:
            key = json.loads(f'"{key.decode()}"').encode()
        except ValueError:  # also covers bytes that are no text and lone surrogates
            return None
    found = _OBJECT_KEY.fullmatch(key)
    if found is None:
        return None
    digits = found[1].lstrip(b"0") or b"0"
    return int(digits) if len(digits) <= MAX_NUMBER_DIGITS else NUMBER_TOO_LARGE
