"""What an import found and did, as values and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_SHOWN: Final = 20


@dataclass(frozen=True, kw_only=True)
class ImportProblem:
    """One broken annotation: the ``file`` it stands in, the ``item`` in it, a ``kind`` to count, and why."""

    file: str
    item: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.item}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """Images and objects written to one split."""

    num_images: int
    num_objects: int


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What was written to ``folder``, by split, and what was left out with its problem.

    ``num_images_left_out`` and ``num_objects_left_out`` count what the source holds and the result does not;
    an object on an image that was left out is among them.
    """

    folder: Path
    splits: Mapping[str, SplitCount]
    num_images_left_out: int
    num_objects_left_out: int
    problems: tuple[ImportProblem, ...]


def describe_summary(summary: ImportSummary) -> str:
    """Return the summary as lines for a terminal: splits, what was left out, then the problems."""
    lines = [
        f"{split}: {count.num_images} images, {count.num_objects} objects"
        for split, count in summary.splits.items()
    ]
    lines.append(f"left out: {summary.num_images_left_out} images, {summary.num_objects_left_out} objects")
    return "\n".join([*lines, *list_problems(summary.problems), f"written to {summary.folder}"])


def list_problems(problems: Sequence[ImportProblem]) -> list[str]:
    """Return a line for each kind of problem with its count, then the first MAX_SHOWN problems."""
    counts = Counter(problem.kind for problem in problems)
    lines = [f"  {count} x {kind}" for kind, count in sorted(counts.items())]
    lines += [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"  and {len(problems) - MAX_SHOWN} more")
    return lines
