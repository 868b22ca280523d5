"""Turns a merged source tree into a `RunConfig`, or into every problem that it has, in one go."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.cross_checks import cross_check
from configs.problems import KeyPath, Problem, Source
from configs.removed_keys import take_removed_keys
from configs.schema import RunConfig
from configs.schema_walk import did_you_mean, find_key, is_section, schema_keys
from configs.source_lines import SourceTree

PLACEHOLDER = re.compile(r"^<[^<>|]+>$")
EXACT_KEY: tuple[str, ...] = ("stage2_ab", "schedule", "b_ratio")
MAX_SHOWN_CHARS = 80
MAX_ADVISED = 100  # faults with advice of their own: looking for what was meant takes milliseconds each
# Stand-ins for required keys that are missing or wrong, so that the other keys can still be checked
# against each other; a problem that looks at a stand-in is never told.
STAND_INS: dict[KeyPath, Any] = {
    ("run", "name"): "stand-in",
    ("data", "train_jsonl"): "stand-in.jsonl",
    ("custom", "trainer_variant"): "rollout_matching_sft",
    ("training", "effective_batch_size"): 1,
    ("training", "global_max_length"): 1 << 30,
    ("training", "max_steps"): 1 << 30,
}


def validate(tree: SourceTree) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration, or None with every problem; each problem has the source of its leading key."""
    mapping = copy.deepcopy(tree.mapping)
    sources = dict(tree.sources)
    _drop_empty_sections(mapping, sources)
    problems = list(tree.problems)
    problems += take_removed_keys(mapping)
    problems += _placeholders(mapping)
    _use_exact_text(mapping, sources)
    config, faults = _build(mapping, _broken(problems))
    problems += faults
    if config is not None:
        explicit = frozenset(p for p in sources if _key_of(p) == p and not is_section(_key_of(p)))
        broken = _broken(problems)
        problems += [p for p in cross_check(config, explicit) if not _touches(p, broken)]
    if problems or config is None:
        return None, [_with_source(problem, sources) for problem in problems]
    return config.with_sources_recorded(sources), []


def _build(mapping: dict[str, Any], broken: list[KeyPath]) -> tuple[RunConfig | None, list[Problem]]:
    """Validate; on faults take the faulty values out, put stand-ins in, and build what is left."""
    for path in broken:
        _remove(mapping, path)
    for key in schema_keys():
        if key.section is not None and key.info.is_required():
            mapping.setdefault(key.name, {})
    try:
        return RunConfig.model_validate(mapping), []
    except ValidationError as exc:
        errors = exc.errors()
        problems = [_problem(error, may_advise=place < MAX_ADVISED) for place, error in enumerate(errors)]
    problems = [p for p in problems if not any(p.paths[0][: len(bad)] == bad for bad in broken)]
    for problem in problems:
        _remove(mapping, problem.paths[0])
    for path, value in STAND_INS.items():
        _set_missing(mapping, path, value)
    try:
        return RunConfig.model_validate(mapping), problems
    except ValidationError:
        return None, problems


def _problem(error: ErrorDetails, *, may_advise: bool) -> Problem:
    path: KeyPath = error["loc"]
    names = _key_of(path)
    if error["type"] == "extra_forbidden":
        holding = f" (holding {', '.join(error['input'])})" if isinstance(error["input"], dict) else ""
        advice = did_you_mean(names) if may_advise else "docs/CONFIG.md lists every key"
        return Problem(message=f"unknown key{holding}; {advice}", paths=(path,))
    key = find_key(names)
    meaning = f" ({key.info.description})" if key is not None and key.info.description else ""
    if error["type"] == "missing":
        return Problem(message=f"is required{meaning}", paths=(path,))
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be ", "expected ").replace("String should ", "expected text to ")
    message = message[:1].lower() + message[1:]
    # A password may stand where it should not: values of the broker section never print.
    got = "a value that is not shown" if path and path[0] == "broker" else _shown(error["input"])
    if is_section(names) and error["type"] == "model_type":
        message = "expected a mapping of keys"
    return Problem(message=f"got {got}, {message}{meaning}", paths=(path,))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _placeholders(mapping: dict[str, Any]) -> list[Problem]:
    problems = []
    for path, value in _leaves(mapping, ()):
        if isinstance(value, str) and PLACEHOLDER.match(value):
            key = find_key(_key_of(path))
            meaning = f": {key.info.description}" if key is not None and key.info.description else ""
            problems.append(Problem(message=f"fill in the placeholder {value}{meaning}", paths=(path,)))
    return problems


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def _use_exact_text(mapping: dict[str, Any], sources: dict[KeyPath, Source]) -> None:
    """Put the written text of the exact decimal back in place of its float [S-1]."""
    parent: Any = mapping
    for key in EXACT_KEY[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    source = sources.get(EXACT_KEY)
    if isinstance(parent, dict) and isinstance(parent.get(EXACT_KEY[-1]), float) and source and source.text:
        parent[EXACT_KEY[-1]] = source.text


def _drop_empty_sections(mapping: dict[str, Any], sources: dict[KeyPath, Source]) -> None:
    """Take out sections written without a value; a section without keys has all its defaults."""
    for key in schema_keys():
        parent: Any = mapping
        for name in key.path[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        name = key.path[-1]
        if is_section(key.path) and isinstance(parent, dict) and name in parent and parent[name] is None:
            del parent[name]
            sources.pop(key.path, None)


def _key_of(path: KeyPath) -> tuple[str, ...]:
    return tuple(part for part in path if isinstance(part, str))


def _broken(problems: Iterable[Problem]) -> list[KeyPath]:
    return [problem.paths[0] for problem in problems if problem.paths]


def _touches(problem: Problem, broken: list[KeyPath]) -> bool:
    """Whether one of the problem's keys is, holds or lies in a broken one."""
    return any(
        path[: len(bad)] == bad or bad[: len(path)] == path
        for path in map(_key_of, problem.paths)
        for bad in map(_key_of, broken)
    )


def _remove(mapping: dict[str, Any], path: KeyPath) -> None:
    """Delete the value at `path`; a list goes as a whole."""
    value: Any = mapping
    for position, part in enumerate(path):
        if not isinstance(value, dict) or part not in value:
            return
        if position == len(path) - 1 or not isinstance(value[part], dict):
            del value[part]
            return
        value = value[part]


def _set_missing(mapping: dict[Any, Any], path: KeyPath, stand_in: Any) -> None:
    parent = mapping
    for part in path[:-1]:
        parent = parent.setdefault(part, {})
    parent.setdefault(path[-1], stand_in)


def _with_source(problem: Problem, sources: dict[KeyPath, Source]) -> Problem:
    """The source of the first key that someone wrote, else that of the nearest section above."""
    if problem.source is not None or not problem.paths:
        return problem
    lead = problem.paths[0]
    above = [lead[:length] for length in range(len(lead) - 1, 0, -1)]
    for path in (*problem.paths, *above):
        if path in sources:
            return replace(problem, source=sources[path])
    return problem
