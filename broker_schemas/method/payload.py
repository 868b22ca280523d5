"""The text of an object list: one line of JSON whose coordinates are quoted coordinate tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from broker_schemas.method.coordinates import coordinate_token
from broker_schemas.records.records import GroundTruthObject


@dataclass(frozen=True, kw_only=True)
class RenderedEntries:
    """Text of object entries and the character spans (start, end) of their ``desc`` values inside it.

    A span covers the value between its quotes, as written (escapes included).
    """

    text: str
    desc_spans: tuple[tuple[int, int], ...]


def render_entries(
    objects: Sequence[GroundTruthObject], *, first_number: int = 1, opening: str = "", closing: str = "}"
) -> RenderedEntries:
    """Return ``opening``, the entries ``"object_N": {…}`` joined by ``", "``, then ``closing``.

    Numbers count up from ``first_number``. A whole payload is ``opening="{"``; what is appended to a prefix
    that holds an entry already is ``opening=", "``. No objects: ``opening + closing``
    (the caller leaves ``opening`` empty where nothing follows).
    """
    parts, spans, length = [opening], [], len(opening)
    for index, item in enumerate(objects):
        desc = json.dumps(item.desc, ensure_ascii=False)
        head = f'{", " if index else ""}"object_{first_number + index}": {{"desc": '
        tail = f', "{item.geometry}": {_render_coordinates(item)}}}'
        start = length + len(head) + 1
        spans.append((start, start + len(desc) - 2))
        parts.append(head + desc + tail)
        length += len(head) + len(desc) + len(tail)
    parts.append(closing)
    return RenderedEntries(text="".join(parts), desc_spans=tuple(spans))


def render_payload(objects: Sequence[GroundTruthObject]) -> RenderedEntries:
    """Return the whole assistant payload; ``{}`` for no objects."""
    return render_entries(objects, opening="{")


def _render_coordinates(item: GroundTruthObject) -> str:
    quoted = [f'"{coordinate_token(value)}"' for value in item.bins]
    if item.geometry == "poly":
        quoted = [f"[{x}, {y}]" for x, y in zip(quoted[0::2], quoted[1::2], strict=True)]
    return f"[{', '.join(quoted)}]"
