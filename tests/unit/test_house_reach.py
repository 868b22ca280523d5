"""Nothing is promised that no run reaches: public names hang on a command, role or library table [U-6]."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Final

import pytest

from tests.source_tree import PACKAGES, ROOT, SourceFile, dotted, python_files

# where a run begins: the command line, roles started as modules of their own, and vLLM's plug-ins
STARTS: Final = ("rollstream.commands.", "rollstream.stack.learner_launcher", "rollstream.assets.")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def library_names() -> set[str]:
    """Return the last parts of the names in the design's table of what others rely on."""
    text = (ROOT / "docs" / "DESIGN.md").read_text("utf-8")
    table = text.split("\n## 7. Names others rely on\n", 1)[1].split("\n#", 1)[0]
    codes = re.findall(r"`([\w.]+)", table)
    return {code.rpartition(".")[2] for code in codes}


def definitions(file: SourceFile) -> Iterator[tuple[str, ast.stmt]]:
    """Yield (name, node) of what a module defines on its own floor."""
    for node in file.tree.body:
        if isinstance(node, Definition):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def used_names(node: ast.AST) -> set[str]:
    """Return the plain names, attributes and quoted annotations in ``node``."""
    names = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
    return names | {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}


@cache
def uses() -> dict[str, set[str]]:
    """Return, for each defined name, the names that its definitions use; "" holds what modules do at start.

    Names are not resolved: two things of one name are one here, which only makes the rule milder.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for file in python_files(*PACKAGES):
        starts = file.module.startswith(STARTS) or '__name__ == "__main__"' in file.text
        defined = dict(definitions(file))
        for name, node in defined.items():
            found[name] |= used_names(node)
            if starts:
                found[""].add(name)
        for node in file.nodes:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name].add(alias.name)
        for node in file.tree.body:
            if node not in defined.values() and not isinstance(node, ast.Import | ast.ImportFrom):
                found[""] |= used_names(node)
    return found


def reached() -> set[str]:
    graph = uses()
    waiting, seen = [*graph[""], *library_names()], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
    return seen


@pytest.mark.req("U-6")
def test_every_public_name_is_reached_from_a_command_a_role_or_the_library_table() -> None:
    known = reached()
    offences = [
        f"{file.path}:{node.lineno} {name}"
        for file in python_files(*PACKAGES)
        for name, node in definitions(file)
        if not name.startswith("_") and name not in known
    ]
    assert not offences, "reach it, or take it out:\n" + "\n".join(offences)


@pytest.mark.req("U-6")
def test_every_public_method_is_called_by_something() -> None:
    used: dict[str, int] = defaultdict(int)
    for file in python_files(*PACKAGES):
        for node in file.nodes:
            if isinstance(node, ast.Attribute):
                used[node.attr] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used[node.value] += 1  # by its name in a message: a server's method, say
    ours = {name for file in python_files(*PACKAGES) for name, _ in definitions(file)}
    offences = [
        f"{file.path}:{method.lineno} {owner.name}.{method.name}"
        for file in python_files(*PACKAGES)
        for owner in file.tree.body
        if isinstance(owner, ast.ClassDef) and owner.name not in library_names()
        # what a library's own class is asked for, the library asks
        if {dotted(base).rpartition(".")[2] for base in owner.bases} <= {*ours, "Protocol"}
        for method in owner.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
        if not method.name.startswith("_") and not used[method.name]
    ]
    assert not offences, "call it, or take it out:\n" + "\n".join(offences)
