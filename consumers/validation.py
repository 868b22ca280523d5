"""Strict validation of one object's JSON: what it is, or the one reason why it is dropped.

Owns the reasons and their order (section 4, 9); it must not know where the object stood in a rollout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from broker_schemas.method.coordinates import NUM_BINS, coordinate_token
from broker_schemas.records.reasons import ObjectDropReason

Geometry = Literal["bbox_2d", "poly"]
_GEOMETRIES: Final[tuple[Geometry, ...]] = ("bbox_2d", "poly")
_COORDINATES: Final = tuple(coordinate_token(index) for index in range(NUM_BINS))
_PLAIN_OBJECT: Final = re.compile(
    rb'\{"desc": "([^"\\\x00-\x1f]*)", "(bbox_2d|poly)": (\[[^{}]*\])\}', re.DOTALL
)
_IS_COORDINATE: Final = frozenset(_COORDINATES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidObject:
    """An object that passed: its text and its geometry; the bins are those of its captured tokens."""

    desc: str
    geometry: Geometry


def parse_json(data: bytes) -> Any:
    """Return the JSON value in ``data``, a map as its list of (key, value) pairs so that repeated keys show.

    Raises ValueError for anything that is no strict JSON in UTF-8: NaN and infinities, lone surrogates, and
    nesting deeper than the interpreter's stack included.
    """
    try:
        text = data.decode()
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(_plain(value), ensure_ascii=False).encode()
    except RecursionError as exc:
        raise ValueError(f"json: nested too deep, at {len(data)} bytes") from exc
    return value


def validate_object(
    span: bytes, number: int, seen_numbers: Collection[int], captured_bins: Sequence[int]
) -> ValidObject | ObjectDropReason:
    """Return what the object ``{…}`` in ``span`` is, or the first reason that speaks against it.

    ``seen_numbers`` are the numbers of all keys before it; ``captured_bins`` the bins of the coordinate
    tokens inside its open lists, in order.
    """
    plain = None if number in seen_numbers else _plain_object(span, captured_bins)
    if plain is not None:
        return plain
    try:
        pairs: _Pairs = parse_json(span)
    except ValueError:
        return "malformed_json"
    if _has_invalid_keys(pairs):
        return "key_invalid"
    if number in seen_numbers:
        return "duplicate_key"
    fields = dict(pairs)
    desc = fields.pop("desc", None)
    if not isinstance(desc, str) or not desc.strip():
        return "missing_desc"
    if not fields:
        return "missing_geom"
    ((name, value),) = fields.items()
    for geometry in _GEOMETRIES:
        if name == geometry:
            reason = _geometry_problem(geometry, value, captured_bins)
            return reason or ValidObject(desc=desc, geometry=geometry)
    return "unknown_geom"


def _plain_object(span: bytes, captured_bins: Sequence[int]) -> ValidObject | None:
    """Return the object of a span that is written plainly and has nothing against it, else None."""
    found = _PLAIN_OBJECT.fullmatch(span)
    if found is None:
        return None
    geometry: Geometry = "poly" if found[2] == b"poly" else "bbox_2d"
    if not _is_plain_list(found[3], geometry, captured_bins):
        return None
    try:
        desc = found[1].decode()
    except ValueError:
        return None
    values = [_COORDINATES[index] for index in captured_bins]
    is_wrong = _geometry_problem(geometry, values, captured_bins) is not None
    return ValidObject(desc=desc, geometry=geometry) if desc.strip() and not is_wrong else None


def _is_plain_list(text: bytes, geometry: Geometry, bins: Sequence[int]) -> bool:
    """Whether ``text`` is the list of ``bins`` as it is written plainly: flat, or a polygon in points."""
    texts = [_COORDINATES[index] for index in bins]
    flat = '", "'.join(texts)
    if text == f'["{flat}"]'.encode():
        return True
    if geometry != "poly" or len(texts) % 2:
        return False
    points = [f'["{x}", "{y}"]' for x, y in zip(texts[0::2], texts[1::2], strict=True)]
    return text == f"[{', '.join(points)}]".encode()


class _Pairs(list[tuple[str, Any]]):
    """A JSON map as it was written; its own type tells it from a JSON list."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"json: got {name}, expected a number")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refuse_constant)


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return [[key, _plain(item)] for key, item in value]
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _has_invalid_keys(pairs: _Pairs) -> bool:
    """Repeated or contradicting keys, or foreign ones beside others; a lone foreign key is no geometry."""
    names = [name for name, _ in pairs]
    return len(set(names)) != len(names) or len(names) - ("desc" in names) > 1


def _geometry_problem(
    geometry: Geometry, value: Any, captured_bins: Sequence[int]
) -> ObjectDropReason | None:
    values = _flat_values(geometry, value)
    if values != [_COORDINATES[index] for index in captured_bins]:
        return "wrong_arity" if _holds_coordinates_alone(value) else "non_coord_token"
    if geometry == "poly":
        return None
    x1, y1, x2, y2 = captured_bins
    return "bbox_invalid" if x2 <= x1 or y2 <= y1 else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and not isinstance(value, _Pairs)


def _holds_coordinates_alone(value: Any) -> bool:
    """Whether every value in a list, at any depth, is the text of a coordinate token; none at all passes."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if _is_list(item):
            waiting += item
        elif not isinstance(item, str) or item not in _IS_COORDINATE:
            return False
    return True


def _flat_values(geometry: Geometry, value: Any) -> list[Any] | None:
    """Return the values of a list with as many as its geometry needs, else None; a polygon may be flat."""
    if not _is_list(value):
        return None
    if geometry == "bbox_2d":
        return value if len(value) == 4 else None
    if value and all(_is_list(item) for item in value):
        if any(len(item) != 2 for item in value):
            return None
        value = [coordinate for point in value for coordinate in point]
    return value if len(value) >= 6 and len(value) % 2 == 0 else None
