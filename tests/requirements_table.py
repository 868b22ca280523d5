"""Which test proves which requirement: `make requirements` prints each id with its tests, gaps included.

Exit status 1 when tests cannot be collected or name an id that docs/REQUIREMENTS.md does not have; a gap is
told and is no fault of this program.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
REQUIREMENTS: Final = ROOT / "docs" / "REQUIREMENTS.md"
_LINE: Final = re.compile(r"^- ([A-Z]-\d+) (.+)$", re.MULTILINE)


def read_requirements(text: str) -> dict[str, str]:
    """Return id -> sentence in the order of the document; raises ValueError for an id said twice."""
    found: dict[str, str] = {}
    for requirement_id, sentence in _LINE.findall(text):
        if requirement_id in found:
            raise ValueError(f"requirements: {requirement_id} stands there twice, expected once")
        found[requirement_id] = sentence
    return found


def proofs_by_requirement(marks: Iterable[tuple[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Return id -> names of its tests in the order given; the cases of one test count once."""
    found: dict[str, list[str]] = {}
    for test, requirement_ids in marks:
        name = test.partition("[")[0]
        for requirement_id in requirement_ids:
            tests = found.setdefault(requirement_id, [])
            if name not in tests:
                tests.append(name)
    return found


def render(requirements: Mapping[str, str], tests: Mapping[str, Sequence[str]]) -> str:
    """Return the table as text: ids with their tests, then the gaps, then ids that nobody knows."""
    lines = []
    for requirement_id, sentence in requirements.items():
        lines.append(f"{requirement_id}  {sentence}")
        lines += [f"      {test}" for test in tests.get(requirement_id, ["GAP: no test"])]
    gaps = [requirement_id for requirement_id in requirements if requirement_id not in tests]
    lines += ["", f"{len(requirements) - len(gaps)} of {len(requirements)} requirements have a test."]
    if gaps:
        lines.append(f"Gaps: {', '.join(gaps)}")
    if unknown := sorted(set(tests) - set(requirements)):
        lines.append(f"Unknown ids in marks: {', '.join(unknown)}")
    return "\n".join(lines)


class MarkCollector:
    """A pytest plugin that notes the ``req`` marks of every collected test."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, tuple[str, ...]]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            ids = tuple(str(each) for mark in item.iter_markers("req") for each in mark.args)
            self.marks.append((item.nodeid, ids))


def main() -> int:
    collector, output = MarkCollector(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")], [collector]
        )
    if status != pytest.ExitCode.OK:
        sys.stderr.write(output.getvalue()[-3000:])
        return 1
    requirements = read_requirements(REQUIREMENTS.read_text("utf-8"))
    tests = proofs_by_requirement(collector.marks)
    sys.stdout.write(render(requirements, tests) + "\n")
    return 1 if set(tests) - set(requirements) else 0


if __name__ == "__main__":
    sys.exit(main())
