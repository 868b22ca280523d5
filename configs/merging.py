"""Joins a file with the files it extends and with the overrides of the command line, keeping every source."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from configs.problems import KeyPath, Problem, ProblemsFound, Source
from configs.source_lines import MAX_DEPTH, MAX_VALUES, SourceTree, parse_yaml, read_yaml_file

EXTENDS_KEY = "extends"
OVERRIDE_NAME = "override"
MAX_OVERRIDES = 500
MAX_FILES = 16
MAX_NAME_CHARS = 80
Sources = dict[KeyPath, Source]


def read_with_extends(path: Path, *, above: tuple[Path, ...] = (), num_above: int = 0) -> SourceTree:
    """Read `path` and the files that it extends; the extending file wins, key by key.

    `above` are the files that led here, `num_above` the values in them.
    Raises `ProblemsFound` for an unreadable file, a cycle, or more files or values than a configuration has.
    """
    tree = read_yaml_file(path)
    base_name = tree.mapping.pop(EXTENDS_KEY, None)
    source = tree.sources.pop((EXTENDS_KEY,), None)
    if source is None:
        return tree
    num_values = num_above + len(tree.sources)
    problem = _extends_fault(path, base_name, above, num_values)
    if problem is not None:
        raise ProblemsFound(
            [*tree.problems, Problem(message=problem, paths=((EXTENDS_KEY,),), source=source)]
        )
    try:
        base = read_with_extends(
            path.parent / base_name, above=(*above, path.resolve()), num_above=num_values
        )
    except ProblemsFound as found:
        told = Problem(message=f"cannot use {base_name}", paths=((EXTENDS_KEY,),), source=source)
        raise ProblemsFound([*tree.problems, told, *found.problems]) from found
    merge_into(base, tree)
    return base


def _extends_fault(path: Path, base_name: Any, above: tuple[Path, ...], num_values: int) -> str | None:
    if not isinstance(base_name, str) or not base_name:
        return f"got {base_name!r}, expected the name of one YAML file, relative to this file"
    base = (path.parent / base_name).resolve()
    chain = (*above, path.resolve())
    if len(chain) >= MAX_FILES or num_values > MAX_VALUES:
        return f"more than {MAX_FILES} files or {MAX_VALUES} values extend each other; join some of them"
    if base in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(base) :], base))
        return f"files extend each other in a circle: {circle}"
    return None


def merge_into(base: SourceTree, top: SourceTree) -> None:
    """Lay `top` over `base`, in place: mappings join, anything else replaces."""
    base.problems.extend(top.problems)
    below: dict[KeyPath, Sources] = {}
    for path, source in top.sources.items():
        for length in range(1, len(path) + 1):
            below.setdefault(path[:length], {})[path] = source
    _merge(base.mapping, base.sources, top.mapping, below, ())


def _merge(
    below: dict[str, Any],
    sources: Sources,
    above: dict[str, Any],
    sources_below: dict[KeyPath, Sources],
    path: KeyPath,
) -> None:
    for key, value in above.items():
        here = (*path, key)
        old = below.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, sources, value, sources_below, here)
            continue
        if key in below:
            _forget(sources, here)
        below[key] = value
        sources.update(sources_below.get(here, {}))


def _forget(sources: Sources, path: KeyPath) -> None:
    for known in [p for p in sources if p[: len(path)] == path]:
        del sources[known]


def apply_overrides(tree: SourceTree, overrides: Iterable[str]) -> None:
    """Lay `a.b.c=value` texts over the tree, in order; the value is read as YAML.

    A text that is no override becomes a problem of the tree, and so do more than ``MAX_OVERRIDES``, of which
    none is looked at; lists are replaced as a whole.
    """
    given = list(islice(overrides, MAX_OVERRIDES + 1))
    if len(given) > MAX_OVERRIDES:
        message = f"got more than {MAX_OVERRIDES}; write them into a file"
        tree.problems.append(Problem(message=message, source=Source(file=f"{OVERRIDE_NAME}s", line=0)))
        return
    for text in given:
        key_text, equals, value_text = text.partition("=")
        keys = [key.strip() for key in key_text.split(".")]
        name = f"{OVERRIDE_NAME} {key_text.strip()}"
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            message = "is not an override; write section.key=value, for example training.max_steps=10"
            tree.problems.append(
                Problem(
                    message=message,
                    source=Source(file=f"{OVERRIDE_NAME} {key_text[:MAX_NAME_CHARS]!r}", line=0),
                )
            )
            continue
        try:
            merge_into(tree, _override_tree(keys, value_text, name))
        except ProblemsFound as found:
            tree.problems.extend(found.problems)


def _override_tree(keys: list[str], value_text: str, name: str) -> SourceTree:
    top = parse_yaml(value_text, name, line_numbers=False)
    value: Any = top.mapping if value_text.strip() else None
    text = value_text.strip() if not isinstance(value, dict | list) else None
    path: KeyPath = tuple(keys)
    top.sources = {(*path, *inner): source for inner, source in top.sources.items()}
    for length in range(1, len(path) + 1):
        top.sources[path[:length]] = Source(file=name, line=0, text=text if length == len(path) else None)
    for key in reversed(keys):
        value = {key: value}
    top.mapping = value
    return top
