"""The table of all keys, written from the schema: `docs/CONFIG.md` is exactly this."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from configs.removed_keys import REMOVED_KEYS, RemovedKey
from configs.schema import RunConfig
from configs.schema_walk import SchemaKey, schema_keys
from configs.source_lines import plain_text

INTRO = """\
# Configuration

This page is written from the schema (`configs.show.markdown_table()`); change the schema, not this page.

- A configuration is one YAML file with the sections below.
- Scalars follow YAML 1.2: `1e-3` is a number, `on` is a word.
- `extends: other.yaml` lays a file over another one, named relative to itself.
- Mappings then join, key by key; anything else, lists included, replaces.
- `section:` with nothing behind it takes out what the extended file says in that section.
- `section.key=value` on the command line overrides a file.
- Paths are relative to the working directory, never to the file; run from the project's root.
- The environment is never read here; `broker.username_env` and `broker.password_env` name credentials.
- Every problem of a file is told in one report, each with its file and line.
- Unknown keys, removed keys and keys that would have no effect are refused.
- `rollstream config check FILE`, `config show FILE` and `config schema` check, explain and describe.
"""


def markdown_table() -> str:
    """The whole page: one table per section, then the removed keys."""
    lines = [INTRO]
    for key in schema_keys():
        if len(key.path) == 1:
            lines += _section_table(key)
    lines += ["## Removed keys", "", "| key | what to do | under |", "|---|---|---|"]
    lines += [_removed_row(removed) for removed in REMOVED_KEYS]
    return "\n".join(lines) + "\n"


def _section_table(top: SchemaKey) -> Iterator[str]:
    assert top.section is not None
    yield f"## {top.name}"
    yield ""
    yield " ".join((top.section.__doc__ or "").split())
    yield ""
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key in schema_keys():
        if key.path[0] == top.name and (key.section is None or key.in_list):
            yield _key_row(key)
    yield ""


def _key_row(key: SchemaKey) -> str:
    kind = value_kind(property_schema(key.path)).replace("|", "\\|")
    if key.info.is_required():
        default = "required"
    else:
        default = f"`{plain_text(key.info.get_default(call_default_factory=True))}`"
    return f"| `{key.name}` | {kind} | {default} | {key.info.description} |"


def _removed_row(removed: RemovedKey) -> str:
    name = f"{removed.name}.*" if removed.subtree else removed.name
    return f"| `{name}` | {removed.say} | {', '.join(removed.variants) or 'every variant'} |"


def property_schema(path: tuple[str, ...]) -> dict[str, Any]:
    """The JSON Schema of one key, references resolved on the way."""
    root = _whole_schema()
    node = root
    for name in path:
        node = _resolved(root, node)
        node = _resolved(root, node["items"]) if "items" in node else node
        node = node["properties"][name]
    return node


@cache
def _whole_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _resolved(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    for choice in node.get("anyOf", []):
        reference = reference or choice.get("$ref")
    found: dict[str, Any] = root["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
    return found


def value_kind(schema: dict[str, Any]) -> str:
    """A JSON Schema in a few words: its choices, or its type and range."""
    if "anyOf" in schema:
        return " or ".join(value_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "mapping")
    if isinstance(kind, list):
        kind = " or ".join(kind)
    words = {"object": "mapping", "array": "list", "string": "text", "boolean": "true | false"}
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {plain_text(schema[name])}" for name, sign in bounds if name in schema]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()
