"""What one labelled object of a data set line must be: ``desc`` and exactly one geometry in bins."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from broker_schemas.method.coordinates import LARGEST_BIN
from broker_schemas.method.polygon import canonical_polygon
from broker_schemas.records.records import GroundTruthObject

MAX_DESC_CHARS: Final = 1000
_COORDINATE_TEXT: Final = re.compile(r"<\|coord_(0|[1-9][0-9]{0,2})\|>")
_CHAT_TOKEN: Final = re.compile(r"<\|(?!coord_)[a-z_]+\|>")
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_GEOMETRIES: Final[tuple[Literal["bbox_2d", "poly"], ...]] = ("bbox_2d", "poly")
_FIELDS: Final = frozenset(("desc", *_GEOMETRIES))


class FieldProblem(ValueError):
    """A field that breaks the format; the message names the field, what it got and what was expected."""


class ControlTokenProblem(FieldProblem):
    """A label that holds a control token of the chat format: readable, but not to be trained on."""


def read_object(value: object, name: str) -> GroundTruthObject:
    """Return the object in the decoded JSON ``value``; ``name`` is its field, say ``objects[2]``.

    Raises FieldProblem for anything but a one-line ``desc`` and exactly one of ``bbox_2d`` and ``poly``.
    """
    if not isinstance(value, dict):
        raise FieldProblem(f"{name}: got {value!r:.80}, expected a map with desc and one geometry")
    if not value.keys() <= _FIELDS:
        foreign = min(value.keys() - _FIELDS)
        raise FieldProblem(f"{name}.{foreign}: unknown field, expected desc and one of bbox_2d, poly")
    present = [geometry for geometry in _GEOMETRIES if geometry in value]
    if len(present) != 1:
        got = " and ".join(present) or "no geometry"
        raise FieldProblem(f"{name}: got {got}, expected exactly one of bbox_2d, poly")
    desc = check_desc(value.get("desc"), f"{name}.desc")
    bins = _read_bins(value[present[0]], f"{name}.{present[0]}")
    check_shape(present[0], bins, f"{name}.{present[0]}")
    return GroundTruthObject(desc=desc, geometry=present[0], bins=bins)


def check_desc(value: object, name: str) -> str:
    """Return ``value`` if it is one non-empty line without chat control tokens; raises FieldProblem."""
    if not isinstance(value, str) or not value.strip() or len(value.splitlines()) != 1:
        raise FieldProblem(f"{name}: got {value!r:.80}, expected one non-empty line of text")
    if len(value) > MAX_DESC_CHARS:
        raise FieldProblem(f"{name}: got {len(value)} characters, expected at most {MAX_DESC_CHARS}")
    if _LONE_SURROGATE.search(value):
        raise FieldProblem(f"{name}: got {value!r:.80}, expected text without lone surrogates")
    control = _CHAT_TOKEN.search(value)
    if control:
        raise ControlTokenProblem(f"{name}: got the control token {control.group()}, expected plain text")
    return value


def check_shape(geometry: Literal["bbox_2d", "poly"], bins: tuple[int, ...], name: str) -> None:
    """Raise FieldProblem for a box that encloses nothing or a polygon that is not canonical."""
    if geometry == "bbox_2d":
        if len(bins) != 4:
            raise FieldProblem(f"{name}: got {len(bins)} values, expected 4 (x1, y1, x2, y2)")
        if bins[2] <= bins[0] or bins[3] <= bins[1]:
            raise FieldProblem(f"{name}: got {list(bins)}, expected x1 < x2 and y1 < y2")
        return
    if len(bins) < 6 or len(bins) % 2:
        raise FieldProblem(f"{name}: got {len(bins)} values, expected an even number of at least 6")
    try:
        expected = canonical_polygon(bins)
    except ValueError as exc:
        raise FieldProblem(f"{name}: {exc}") from exc
    if expected != bins:
        raise FieldProblem(
            f"{name}: got {list(bins)}, expected its canonical spelling {list(expected)} "
            "(clockwise from the top-most, then left-most vertex, not closed)"
        )


def _read_bins(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise FieldProblem(f"{name}: got {value!r:.80}, expected a flat list of bins")
    if all(type(item) is int and 0 <= item <= LARGEST_BIN for item in value):
        return tuple(value)
    return tuple(_read_bin(item, f"{name}[{index}]") for index, item in enumerate(value))


def _read_bin(value: Any, name: str) -> int:
    if isinstance(value, str) and (match := _COORDINATE_TEXT.fullmatch(value)):
        return int(match.group(1))
    if type(value) is int and 0 <= value <= LARGEST_BIN:
        return value
    raise FieldProblem(
        f"{name}: got {value!r:.80}, expected a bin 0..{LARGEST_BIN} as an integer or as <|coord_k|>; "
        "'rollstream data import' converts pixels"
    )
