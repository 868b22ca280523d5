"""The project's own source as values, for tests of the house rules: files, imports, calls."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
ROLES: Final = ("producers", "consumers", "learner")
PACKAGES: Final = ("broker_schemas", "configs", *ROLES, "rollstream")


@dataclass(frozen=True, eq=False)
class SourceFile:
    """One Python file, parsed once and walked once: ``nodes`` is the whole tree, flat.

    ``path`` is relative to the root, ``module`` its dotted name.
    """

    path: Path
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @property
    def module(self) -> str:
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    def imports(self) -> tuple[tuple[int, str], ...]:
        """Return (line, full dotted name) of all that is imported anywhere, functions included.

        ``from a.b import c`` gives ``a.b.c``: c may be a module.
        """
        return _imports(self)

    def _found_imports(self) -> Iterator[tuple[int, str]]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:
                    parts = self.module.split(".")
                    if self.path.name != "__init__.py":
                        parts = parts[:-1]
                    base = parts[: len(parts) - node.level + 1]
                    start = ".".join([*base, start] if start else base)
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)

    def attributes(self) -> tuple[tuple[int, str], ...]:
        """Return (line, dotted name) of attribute chains, with import aliases written out."""
        return _attributes(self)

    def _found_attributes(self) -> Iterator[tuple[int, str]]:
        aliases = {
            alias.asname: alias.name
            for node in self.nodes
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.asname
        }
        for node in self.nodes:
            if isinstance(node, ast.Attribute) and (name := dotted(node)):
                head, _, rest = name.partition(".")
                yield node.lineno, f"{aliases.get(head, head)}.{rest}"

    def calls(self) -> tuple[tuple[str, ast.Call], ...]:
        """Return (dotted name of the callee, call); the name is empty where it is no plain name."""
        return _calls(self)

    def _found_calls(self) -> Iterator[tuple[str, ast.Call]]:
        for node in self.nodes:
            if isinstance(node, ast.Call):
                yield dotted(node.func), node


@cache
def _imports(file: SourceFile) -> tuple[tuple[int, str], ...]:
    return tuple(file._found_imports())


@cache
def _attributes(file: SourceFile) -> tuple[tuple[int, str], ...]:
    return tuple(file._found_attributes())


@cache
def _calls(file: SourceFile) -> tuple[tuple[str, ast.Call], ...]:
    return tuple(file._found_calls())


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for a chain of names, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return f"{start}.{node.attr}" if start else ""
    return ""


def listed(found: Iterator[str]) -> str:
    """Return the offences, one a line; empty for none."""
    return "\n".join(sorted(set(found)))


def is_within(name: str, module: str) -> bool:
    """Say whether dotted ``name`` is ``module`` or something inside it."""
    return name == module or name.startswith(f"{module}.")


def python_files(*folders: str) -> tuple[SourceFile, ...]:
    """Return the Python files of top-level ``folders``, sorted by path within each."""
    return tuple(file for folder in folders for file in _files_of(folder))


@cache
def _files_of(folder: str) -> tuple[SourceFile, ...]:
    return tuple(_parsed(path) for path in sorted((ROOT / folder).rglob("*.py")))


def _parsed(path: Path) -> SourceFile:
    text = path.read_text("utf-8")
    tree = ast.parse(text, filename=str(path))
    return SourceFile(path.relative_to(ROOT), text, tree, tuple(ast.walk(tree)))


def script_names() -> list[str]:
    """Return the names of all transitions."""
    folder = ROOT / "broker_schemas" / "broker" / "scripts"
    return sorted(path.stem for path in folder.glob("*.lua") if path.stem != "prelude")


@cache
def project_files() -> tuple[Path, ...]:
    """Return every file that belongs to the project: tracked, or untracked and not ignored.

    Without git (an unpacked archive) it is every file that no tool made.
    """
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        made = {"runs", "data", "models", "build", "dist", "__pycache__"}
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in made or (part.startswith(".") and part != ".ci") or part.endswith(".egg-info")
                for part in path.relative_to(ROOT).parts[:-1]
            )
        ]
    return tuple(sorted(path for path in found if path.is_file() and not path.is_symlink()))
