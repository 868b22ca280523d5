"""Makes text that a model or a data set wrote safe to show in a terminal or on a page."""

from __future__ import annotations

import unicodedata
from typing import Final

_KEPT: Final = frozenset("\n\t")
_PICTURES_START: Final = 0x2400
_DELETE: Final = "\x7f"


def visible_text(text: str) -> str:
    """Return ``text`` with control and direction characters replaced by signs that can be seen.

    Rollout text is hostile input: an escape character would be obeyed by a terminal, and a direction mark
    would reorder what follows it. Line breaks and tabs stay; the empty text stays empty.
    """
    if text.isprintable():  # none of the categories that are replaced, and nearly every text
        return text
    return "".join(_visible(character) for character in text)


def one_line(text: str, max_chars: int) -> str:
    """Return ``text`` visible, on one line, cut to ``max_chars`` with an ellipsis."""
    flat = " ".join(visible_text(text).split())
    return flat if len(flat) <= max_chars else flat[: max(max_chars - 1, 0)] + "…"


def _visible(character: str) -> str:
    if character in _KEPT:
        return character
    category = unicodedata.category(character)
    if category == "Cc":
        if character == _DELETE:
            return "␡"
        return chr(_PICTURES_START + ord(character)) if ord(character) < 0x20 else "�"
    return "�" if category in ("Cf", "Cs", "Zl", "Zp") else character
