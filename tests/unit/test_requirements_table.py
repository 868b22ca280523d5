"""The table of requirements: every id once, gaps named, and no mark that points nowhere."""

from __future__ import annotations

import ast

import pytest

from tests.requirements_table import REQUIREMENTS, proofs_by_requirement, read_requirements, render
from tests.source_tree import python_files

TEXT = "# what must hold\n- M-1 Configuration first.\n- Not a requirement.\n- Q-10 Claims are settled.\n"


def test_ids_and_sentences_are_read_in_order() -> None:
    assert read_requirements(TEXT) == {"M-1": "Configuration first.", "Q-10": "Claims are settled."}


def test_an_id_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="M-1 stands there twice"):
        read_requirements(TEXT + "- M-1 Again.\n")


def test_cases_of_one_test_count_once() -> None:
    marks = [
        ("t.py::a[1]", ("M-1",)),
        ("t.py::a[2]", ("M-1",)),
        ("t.py::b", ("M-1", "Q-10")),
        ("t.py::c", ()),
    ]

    assert proofs_by_requirement(marks) == {"M-1": ["t.py::a", "t.py::b"], "Q-10": ["t.py::b"]}


def test_a_gap_and_an_unknown_id_are_named() -> None:
    shown = render(read_requirements(TEXT), {"M-1": ["t.py::a"], "X-9": ["t.py::b"]})

    assert "M-1  Configuration first.\n      t.py::a\n" in shown
    assert "Q-10  Claims are settled.\n      GAP: no test\n" in shown
    assert "1 of 2 requirements have a test." in shown
    assert "Gaps: Q-10" in shown
    assert "Unknown ids in marks: X-9" in shown


def test_the_document_holds_every_family_of_ids_without_a_hole() -> None:
    families: dict[str, list[int]] = {}
    for requirement_id in read_requirements(REQUIREMENTS.read_text("utf-8")):
        letter, number = requirement_id.split("-")
        families.setdefault(letter, []).append(int(number))

    assert set(families) == set("MPSQVOLDNU")
    for letter, numbers in families.items():
        assert numbers == list(range(1, len(numbers) + 1)), letter


def test_every_mark_names_a_requirement() -> None:
    known = read_requirements(REQUIREMENTS.read_text("utf-8"))
    marks = [
        (f"{file.path}:{call.lineno}", argument)
        for file in python_files("tests")
        for name, call in file.calls()
        if name == "pytest.mark.req"
        for argument in call.args
    ]
    wrong = [
        f"{place} {ast.unparse(argument)}"
        for place, argument in marks
        if not isinstance(argument, ast.Constant) or argument.value not in known
    ]
    assert marks, "no test is marked: this rule looks in the wrong place"
    assert not wrong, wrong
