"""The house rules of everything that is not code: documents that are there and true, no foreign paths."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import typer.main

from broker_schemas.records.ledger import HANDLERS
from rollstream.commands.program import app
from tests.source_tree import ROOT, project_files, script_names

DOCUMENTS: Final = tuple(sorted((ROOT / "docs").glob("*.md")))
EXPECTED: Final = (
    *("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "Dockerfile", "constraints.txt", ".ci/run"),
    *(f"docs/{name}.md" for name in ("CONFIG", "DESIGN", "PACKING", "REQUIREMENTS", "RUNBOOK", "WIRE")),
)
# put together here, so that this file does not hold what it forbids
FOREIGN: Final = (
    *("/" + "work/", "/tmp/" + "team", "/opt/" + "pypi", "/opt/" + "wheels", "/" + "root/"),
    *("pypi" + ".org", "pytorch" + ".org/whl", "python" + "hosted", "docker" + ".io/", "ghcr" + ".io"),
)
TEXT_SUFFIXES: Final = {
    *("", ".cfg", ".css", ".html", ".ini", ".j2", ".js", ".json", ".lua", ".md", ".py", ".sh", ".toml"),
    *(".txt", ".yaml", ".yml"),
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def program_commands() -> set[str]:
    """Return every command of the program, ``data import`` and ``data`` alike."""

    def below(group: object, start: str) -> Iterator[str]:
        for name, command in getattr(group, "commands", {}).items():
            yield f"{start}{name}"
            yield from below(command, f"{start}{name} ")

    return set(below(typer.main.get_command(app), ""))


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_stranger_looks_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


def test_no_file_names_this_machine_or_a_registry() -> None:
    offences = [
        f"{relative(path)}:{number} {word}"
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 1 << 20
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        for word in FOREIGN
        if word in line
    ]
    assert not offences, offences


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCUMENTS], ids=relative)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8"))
    missing = [
        target
        for target in targets
        if not re.match(r"https?:", target) and not (path.parent / target).exists()
    ]
    assert not missing, missing


@pytest.mark.req("O-8")
@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCUMENTS], ids=relative)
def test_commands_in_the_documents_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    code = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    known = program_commands()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))

    said = re.findall(r"\brollstream ([a-z]+)(?: ([a-z]+))?", code)
    unknown = {first for first, _ in said if first not in known}
    for first, second in said:
        if any(command.startswith(f"{first} ") for command in known) and second:
            unknown |= {f"{first} {second}"} - known
    unknown |= {f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z-]*)", code) if name not in targets}

    assert not unknown, unknown


def section_of(document: str, heading: str) -> str:
    text = (ROOT / "docs" / document).read_text("utf-8")
    return text.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]


@pytest.mark.req("Q-2")
def test_the_design_lists_every_transition_and_every_event() -> None:
    rows = [
        line.split("|") for line in section_of("DESIGN.md", "### Transitions").splitlines() if "`" in line
    ]
    listed = {
        re.findall(r"`(\w+)`", row[1])[0]: set(re.findall(r"`(\w+)`", row[3])) for row in rows if row[1:]
    }

    assert set(listed) == set(script_names())
    assert set().union(*listed.values()) == set(HANDLERS)
    scripts = ROOT / "broker_schemas" / "broker" / "scripts"
    for name, events in listed.items():
        emitted = set(re.findall(r"emit\('(\w+)'", (scripts / f"{name}.lua").read_text("utf-8")))
        assert emitted <= events, f"{name} also emits {emitted - events}"


def test_the_names_others_rely_on_can_be_imported() -> None:
    table = section_of("DESIGN.md", "## 7. Names others rely on")
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    found, module = [], ""
    for code in [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]:
        name = re.split(r"[^\w.]", code)[0]
        if "." in name:
            module, _, name = name.rpartition(".")
        elif name.islower() and "(" not in code:
            continue  # a field of what the function returns
        found.append(getattr(importlib.import_module(module), name))
    assert len(found) >= 14


def test_the_makefile_has_every_promised_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    promised = {"demo", "test", "check", "up", "down", "bench", "requirements", "assets", "clean"}
    assert promised <= targets


def test_constraints_pin_every_dependency_once_and_sorted() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += project["optional-dependencies"]["local"] + project["optional-dependencies"]["dev"]
    wanted_names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=\[;~! ]", item)[0]).lower() for item in wanted}

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines)
    assert names == sorted(set(names))
    assert wanted_names <= set(names), wanted_names - set(names)
    assert "torch==2.13.0" in lines


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert text.startswith("# Changelog\n")
    assert "## [Unreleased]" in text
    headings = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Schema"}
    assert "Schema" in headings


def test_the_image_runs_as_nobody_special() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users, "the image runs as root"
    assert users[-1] not in ("root", "0")
    assert 'ENTRYPOINT ["rollstream"]' in lines
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)
