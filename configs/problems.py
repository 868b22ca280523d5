"""One problem of a configuration and the report of all of them; knows nothing of YAML or of the schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
MAX_LINES = 100
MAX_LINE_CHARS = 600


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a value was written: a file and its line (from 1), or the command line (`line` is 0)."""

    file: str
    line: int
    text: str | None = None

    def __str__(self) -> str:
        """`file:line`, or the bare name when there is no line."""
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong; `paths` are the keys it is about, the first one leads."""

    message: str
    paths: tuple[KeyPath, ...] = ()
    source: Source | None = None


class ProblemsFound(Exception):
    """Carries problems out of a reader that cannot go on; never leaves this package."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = tuple(problems)


def dotted(path: KeyPath) -> str:
    """`("a", "b", 0, "c")` as `a.b[0].c`; the empty path is the empty string."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def render(file: str, problems: Iterable[Problem]) -> str:
    """One report: a headline, then one line per problem in the order of file and line, the first hundred."""
    found = list(problems)
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    return "\n".join([f"{file}: {count}", *(f"  {line}" for line in problem_lines(file, found))])


def problem_lines(file: str, problems: Iterable[Problem]) -> list[str]:
    """The problems as text, those of `file` first, each led by where it was written and its key path.

    After `MAX_LINES` of them a last line says how many more there are; long lines are cut.
    """

    def order(problem: Problem) -> tuple[bool, str, int, str]:
        source = problem.source or Source(file=file, line=0)
        return (source.file != file, source.file, source.line, problem.message)

    lines = []
    ordered = sorted(problems, key=order)
    for problem in ordered[:MAX_LINES]:
        where = str(problem.source) if problem.source else file
        key = f"{dotted(problem.paths[0])}: " if problem.paths else ""
        line = f"{where}: {key}{problem.message}"
        lines.append(line if len(line) <= MAX_LINE_CHARS else line[:MAX_LINE_CHARS] + "...")
    if len(ordered) > MAX_LINES:
        lines.append(f"and {len(ordered) - MAX_LINES} more; mend these first")
    return lines
