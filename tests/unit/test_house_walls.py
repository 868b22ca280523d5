"""The walls of the house: which package, wing and room may import which, and who names a run's files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

import pytest

from tests.source_tree import PACKAGES, ROLES, ROOT, SourceFile, is_within, listed, python_files

MAY_IMPORT: Final = {
    "broker_schemas": {"broker_schemas"},
    "configs": {"configs", "broker_schemas"},
    **{role: {role, "broker_schemas", "configs"} for role in ROLES},
    "rollstream": set(PACKAGES),
}
# wings of rollstream and rooms of broker_schemas, from the top: each imports only from those below it
WINGS: Final = {
    "rollstream": (
        *("commands", "sweep", "bench", "doctor", "stack", "watch", "show", "history"),
        *("models", "evaluation", "datasets", "vllm", "wiring"),
    ),
    "broker_schemas": ("rollout_servers", "broker", "method", "records"),
}
# the library doors, each loaded when it is first asked for
DOORS: Final = "rollstream/__init__.py"
MOST_FILES_ON_A_FLOOR: Final = 4


def wing_of(package: str, name: str) -> str:
    """Return the wing that dotted ``name`` lies in; empty for a file on the package's own floor."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in WINGS[package] else ""


def test_packages_import_only_what_lies_beneath_them() -> None:
    offences = listed(
        f"{file.path}:{line} imports {name}"
        for file in python_files(*PACKAGES)
        for line, name in file.imports()
        if name.split(".")[0] in {*PACKAGES, "tests"} - MAY_IMPORT[file.package]
    )
    assert not offences, f"roles never import each other, and nothing imports upwards:\n{offences}"


@pytest.mark.parametrize("package", sorted(WINGS))
def test_a_wing_imports_only_from_wings_below_it(package: str) -> None:
    order = WINGS[package]
    offences = listed(
        f"{file.path}:{line} imports {name}"
        for file in python_files(package)
        if (own := wing_of(package, file.module))
        for line, name in file.imports()
        if is_within(name, package) and (other := wing_of(package, name))
        if order.index(other) < order.index(own)
    )
    assert not offences, f"from the top: {', '.join(order)}:\n{offences}"


@pytest.mark.parametrize("package", sorted(WINGS))
def test_every_wing_is_known_and_the_floor_holds_few_files(package: str) -> None:
    folder = ROOT / package
    assert {path.parent.name for path in folder.glob("*/__init__.py")} == set(WINGS[package])
    on_the_floor = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(on_the_floor) <= MOST_FILES_ON_A_FLOOR, sorted(on_the_floor)


@pytest.mark.parametrize("package", sorted(WINGS))
def test_the_files_on_a_packages_floor_import_no_wing_but_their_own_core(package: str) -> None:
    below = {"rollstream": (), "broker_schemas": ("records", "broker")}[package]
    offences = listed(
        f"{file.path}:{line} imports {name}"
        for file in python_files(package)
        if not wing_of(package, file.module)
        if str(file.path) != DOORS
        for line, name in file.imports()
        if is_within(name, package) and wing_of(package, name) not in ("", *below)
    )
    assert not offences, offences


def test_every_package_is_under_the_rules() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(PACKAGES)


def test_consumers_never_import_torch_or_transformers() -> None:
    offences = listed(
        f"{file.path}:{line} imports {name}"
        for file in python_files("consumers")
        for line, name in file.imports()
        if name.split(".")[0] in ("torch", "transformers")
    )
    assert not offences, offences


def test_only_the_run_folder_spells_the_names_of_its_files() -> None:
    home = ROOT / "rollstream" / "run_folder.py"
    tree = ast.parse(home.read_text("utf-8"))
    spelled = {
        node.right.value
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        if isinstance(node.right, ast.Constant) and isinstance(node.right.value, str)
    }
    # words that other things are called too are caught only where a path is built of them
    offences = listed(
        f"{file.path}:{node.lineno} {node.value!r}"
        for file in python_files(*PACKAGES)
        if ROOT / file.path != home
        for node in file.nodes
        if isinstance(node, ast.Constant) and node.value in spelled and "." in str(node.value)
    )
    assert {"train_log.jsonl", "resolved.yaml", "stack.lock"} <= spelled
    assert not offences, f"RunFolder names the files of a run:\n{offences}"


def settings_fields(file: SourceFile) -> Iterator[tuple[str, str, bool]]:
    """(class, field, whether it has a default) of every class named ``…Settings`` in a file."""
    for node in file.nodes:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Settings"):
            continue
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield node.name, statement.target.id, statement.value is not None


def configuration_keys() -> set[str]:
    sections = (walk for file in python_files("configs") for walk in file.nodes)
    return {
        statement.target.id
        for node in sections
        if isinstance(node, ast.ClassDef) and node.name.endswith("Section")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def test_what_a_configuration_sets_has_its_default_there_alone() -> None:
    keys = configuration_keys()
    library = "broker_schemas/client.py"  # used without a configuration
    doubled = [
        f"{file.path}: {name}.{field}"
        for package in ("broker_schemas", *ROLES)
        for file in python_files(package)
        if str(file.path) != library
        for name, field, has_default in settings_fields(file)
        if has_default and field in keys
    ]
    assert len(keys) > 100
    assert not doubled
