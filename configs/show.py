"""Shows configurations: resolved, with the source of each value, checked in bulk, and the schema itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.ignored_settings import has_no_effect
from configs.key_docs import markdown_table
from configs.loader import read_config
from configs.merging import EXTENDS_KEY
from configs.problems import problem_lines
from configs.schema import RunConfig
from configs.schema_walk import SchemaKey, schema_keys
from configs.section import Section
from configs.source_lines import ConfigYamlDumper, plain_text, plain_value

__all__ = [
    "FileReport",
    "SourcedValue",
    "check_files",
    "json_schema",
    "markdown_table",
    "resolved_yaml",
    "sourced_values",
    "with_sources",
]
DEFAULT_SOURCE = "default"


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What a check of one file found; no problems means that it loads."""

    file: str
    problems: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """Whether the file loads."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class SourcedValue:
    """One setting that has an effect, and where it was written: `file:line`, an override, or `default`."""

    key: str
    value: str
    source: str


def resolved_yaml(config: RunConfig) -> str:
    """The configuration with all defaults, as one YAML file that loads to the same configuration.

    Keys that have no effect in it are left out, for a file must not contain them.
    """
    tree: dict[str, Any] = {}
    for key, value in _effective(config):
        parent = tree
        for name in key.path[:-1]:
            parent = parent.setdefault(name, {})
        parent[key.path[-1]] = plain_value(value)
    return yaml.dump(tree, Dumper=ConfigYamlDumper, sort_keys=False, allow_unicode=True, width=100)


def sourced_values(config: RunConfig) -> tuple[SourcedValue, ...]:
    """Every setting that has an effect, in the order of the schema."""
    return tuple(
        SourcedValue(
            key=key.name,
            value=plain_text(value),
            source=str(config.sources.get(key.path, DEFAULT_SOURCE)),
        )
        for key, value in _effective(config)
    )


def with_sources(config: RunConfig) -> str:
    """One line per setting: `key: value  # source`, aligned."""
    values = sourced_values(config)
    texts = [f"{value.key}: {value.value}" for value in values]
    width = max(len(text) for text in texts)
    return "".join(f"{text:<{width}}  # {value.source}\n" for text, value in zip(texts, values, strict=True))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors.

    Sections require nothing in it, for a required key may stand in the file that is extended.
    """
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "rollstream configuration"
    extends = {"type": "string", "description": "File that this one is laid over, relative to this one."}
    schema["properties"] = {EXTENDS_KEY: extends} | schema["properties"]
    in_lists = {key.section.__name__ for key in _lists() if key.section is not None}
    for name, section in [("", schema), *schema["$defs"].items()]:
        if name not in in_lists:
            section.pop("required", None)
    return schema


def check_files(paths: Iterable[str | os.PathLike[str]], overrides: Sequence[str] = ()) -> list[FileReport]:
    """Check each file by itself, with the overrides, in the order given; never raises for its content."""
    reports = []
    for path in paths:
        _, problems = read_config(path, overrides)
        file = str(Path(path))
        reports.append(FileReport(file=file, problems=tuple(problem_lines(file, problems))))
    return reports


def _effective(config: RunConfig) -> Iterator[tuple[SchemaKey, Any]]:
    for key in schema_keys():
        inside_list = any(key.path[: len(other.path)] == other.path != key.path for other in _lists())
        if inside_list or (key.section is not None and not key.in_list) or has_no_effect(config, key.path):
            continue
        parent: Any = config
        for name in key.path[:-1]:
            parent = getattr(parent, name, None)
        if parent is not None:
            yield key, _without_models(getattr(parent, key.path[-1]))


def _lists() -> list[SchemaKey]:
    return [key for key in schema_keys() if key.in_list and key.section is not None]


def _without_models(value: Any) -> Any:
    if isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        return [item.model_dump() for item in value]
    return value
