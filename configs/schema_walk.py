"""Walks the schema: which keys exist, which are sections, and which name a wrong key may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema import RunConfig
from configs.section import Section

NUM_SUGGESTIONS = 3
MAX_LISTED = 12
MAX_KEY_CHARS = 64  # looking for a similar name costs the product of the lengths


@dataclass(frozen=True, kw_only=True)
class SchemaKey:
    """One key of the tree; `path` leaves out list positions, `section` is set where more keys follow."""

    path: tuple[str, ...]
    info: FieldInfo
    section: type[Section] | None
    in_list: bool

    @property
    def name(self) -> str:
        """The key as a user writes it, `a.b.c`."""
        return ".".join(self.path)


@cache
def schema_keys() -> tuple[SchemaKey, ...]:
    """Every key in the order of the schema, a section before its keys."""
    return tuple(_walk(RunConfig, (), False))


def find_key(path: tuple[str, ...]) -> SchemaKey | None:
    """The key at `path`, or None when there is none."""
    return next((key for key in schema_keys() if key.path == path), None)


def is_section(path: tuple[str, ...]) -> bool:
    """Whether a mapping of known keys stands at `path`; the empty path is the whole tree."""
    key = find_key(path)
    return not path or (key is not None and key.section is not None and not key.in_list)


def did_you_mean(path: tuple[str, ...]) -> str:
    """Advice for an unknown key: the same name elsewhere, else similar names beside it, else all of those."""
    *parents, name = path
    if len(name) > MAX_KEY_CHARS:
        return "docs/CONFIG.md lists every key"
    elsewhere = [key.name for key in schema_keys() if key.path[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:NUM_SUGGESTIONS])}?"
    beside = [key.path[-1] for key in schema_keys() if list(key.path[:-1]) == parents]
    close = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join([*parents, *close])}?"
    everywhere = {key.path[-1]: key.name for key in reversed(schema_keys())}
    close = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.75)
    if close:
        return f"did you mean {everywhere[close[0]]}?"
    if not beside or len(beside) > MAX_LISTED:
        return "docs/CONFIG.md lists every key"
    return f"known here: {', '.join(beside)}"


def _walk(section: type[Section], above: tuple[str, ...], in_list: bool) -> Iterator[SchemaKey]:
    for name, info in section.model_fields.items():
        inner, is_list = _section_of(info.annotation)
        path = (*above, name)
        yield SchemaKey(path=path, info=info, section=inner, in_list=in_list or is_list)
        if inner is not None:
            yield from _walk(inner, path, in_list or is_list)


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, Section):
            return argument, get_origin(annotation) is tuple
    return None, False
