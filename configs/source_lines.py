"""Reads one YAML file into plain values and remembers the line and the source text of every key.

Scalars follow YAML 1.2 (`1e-3` is a number, `on` is a word), so that what a user writes is what is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from configs.problems import KeyPath, Problem, ProblemsFound, Source

MAX_DEPTH = 32
MAX_VALUES = 2_000
MAX_FILE_BYTES = 1 << 20
MAX_INTEGER_DIGITS = 40

SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
TAG_STRING = "tag:yaml.org,2002:str"


class ConfigYamlLoader(yaml.SafeLoader):
    """The safe loader with the scalar rules above; used to compose nodes, never to construct objects."""

    yaml_implicit_resolvers = {}
    num_nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose as usual, but no more nodes than a configuration may have: the rest is not even parsed."""
        self.num_nodes += 1
        if self.num_nodes > 2 * MAX_VALUES or self.depth > 2 * MAX_DEPTH:  # keys are nodes as well
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_VALUES} values or {MAX_DEPTH} levels; a configuration has some "
                "hundreds, so look for a list that belongs into a data file",
                problem_mark=None if parent is None else parent.start_mark,
            )
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class ConfigYamlDumper(yaml.SafeDumper):
    """The safe dumper with the same rules, so that what it writes plain is read back as the same value."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in SCALARS:
    for _side in (ConfigYamlLoader, ConfigYamlDumper):
        _side.add_implicit_resolver(_tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first])


@dataclass(kw_only=True)
class SourceTree:
    """Plain values (`mapping`) and, for every key path in them, where it was written."""

    mapping: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, Source] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml_file(path: Path) -> SourceTree:
    """Read one file; raises `ProblemsFound` when it cannot be read as a mapping at all.

    Smaller faults (a key written twice, a foreign tag) are collected in `problems` beside the values.
    """
    try:
        text = _read_bounded(path)
    except FileNotFoundError as exc:
        raise _unreadable(path, "no such file; check the path") from exc
    except IsADirectoryError as exc:
        raise _unreadable(path, "is a folder; name a YAML file in it") from exc
    except OSError as exc:
        raise _unreadable(path, f"cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise _unreadable(path, f"is not UTF-8 text (byte {exc.start}); save it as UTF-8") from exc
    tree = parse_yaml(text, str(path))
    if not isinstance(tree.mapping, dict):
        raise _unreadable(path, "the top level must be a mapping of sections (run, data, model, ...)")
    return tree


def parse_yaml(text: str, file: str, *, line_numbers: bool = True) -> SourceTree:
    """Parse YAML text; an empty document is an empty mapping, a top-level scalar stays one."""
    if len(text) > MAX_FILE_BYTES:
        raise ProblemsFound([Problem(message="is too long for a value", source=Source(file=file, line=0))])
    try:
        node = yaml.compose(text, Loader=ConfigYamlLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = mark.line + 1 if mark is not None and line_numbers else 0
        reason = exc.problem or exc.context or "syntax error"
        raise ProblemsFound(
            [Problem(message=f"is not valid YAML: {reason}", source=Source(file=file, line=line))]
        ) from exc
    except (yaml.YAMLError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc).splitlines()[0]
        raise ProblemsFound(
            [Problem(message=f"is not valid YAML: {reason}", source=Source(file=file, line=0))]
        ) from exc
    builder = _TreeBuilder(file, line_numbers)
    if node is not None:
        builder.tree.mapping = builder.value(node, ())
    return builder.tree


def _read_bounded(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise _unreadable(path, f"is larger than {MAX_FILE_BYTES} bytes; a configuration has some thousands")
    return raw.decode("utf-8")


def _unreadable(path: Path, reason: str) -> ProblemsFound:
    return ProblemsFound([Problem(message=reason, source=Source(file=str(path), line=0))])


class _TreeBuilder:
    """Turns YAML nodes into values; bounded in depth and number, for aliases can multiply and loop."""

    def __init__(self, file: str, line_numbers: bool) -> None:
        self.tree = SourceTree()
        self._file = file
        self._line_numbers = line_numbers
        self._num_values = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._num_values += 1
        if len(path) > MAX_DEPTH or self._num_values > MAX_VALUES:
            message = f"more than {MAX_DEPTH} levels or {MAX_VALUES} values; is an alias inside itself?"
            raise ProblemsFound([Problem(message=message, source=self._source(node))])
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.tree.sources[(*path, index)] = self._source(item)
                items.append(self.value(item, (*path, index)))
            return items
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem("a key must be a plain word", path, key_node)
                continue
            key = key_node.value
            key_path = (*path, key)
            if key in mapping:
                first = self.tree.sources[key_path]
                self._problem(f"written twice, first on line {first.line}; keep one", key_path, key_node)
                continue
            text = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            self.tree.sources[key_path] = self._source(key_node, text)
            mapping[key] = self.value(value_node, key_path)
        return mapping

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = node.value
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int" and len(text) <= MAX_INTEGER_DIGITS:
            return int(text)
        if kind == "float":
            return _float(text)
        if kind not in ("int", "str"):
            self._problem(f"the tag {node.tag} is not supported; write a plain value", path, node)
        return text

    def _problem(self, message: str, path: KeyPath, node: yaml.Node) -> None:
        paths = (path,) if path else ()
        self.tree.problems.append(Problem(message=message, paths=paths, source=self._source(node)))

    def _source(self, node: yaml.Node, text: str | None = None) -> Source:
        line = node.start_mark.line + 1 if self._line_numbers else 0
        return Source(file=self._file, line=line, text=text)


def _float(text: str) -> float:
    lowered = text.lower()
    if lowered.endswith((".inf", ".nan")):
        lowered = lowered.replace(".", "", 1)
    return float(lowered)


def plain_value(value: Any) -> Any:
    """A value as the dumper can write it: tuples as lists, exact decimals with all their digits."""
    if isinstance(value, dict):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain_value(inner) for inner in value]
    return value


def plain_text(value: Any) -> str:
    """A value on one line, as it would stand in a file."""
    text = yaml.dump(
        plain_value(value), Dumper=ConfigYamlDumper, default_flow_style=True, width=10_000, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _write_decimal(dumper: ConfigYamlDumper, value: Decimal) -> yaml.ScalarNode:
    text = format(value, "f")
    tag = "tag:yaml.org,2002:float" if "." in text else "tag:yaml.org,2002:int"
    return dumper.represent_scalar(tag, text)


def _write_text(dumper: ConfigYamlDumper, value: str) -> yaml.ScalarNode:
    # Only double quotes keep these apart from a line break when they are read back.
    style = '"' if any(c in value for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(TAG_STRING, value, style=style)


ConfigYamlDumper.add_representer(Decimal, _write_decimal)
ConfigYamlDumper.add_representer(str, _write_text)
