"""What an import found and did, as values and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MAX_SHOWN: Final = 20
MAX_CLASSES: Final = 40


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
    """Images and objects written to one split, the objects also by class."""

    num_images: int
    num_objects: int
    objects_by_class: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What was written to ``folder``, by split, what was changed on the way, and what was left out and why.

    ``num_images_left_out`` and ``num_objects_left_out`` count what the source holds and the result does not;
    ``num_objects_of_left_out_images`` of them stand on images that were left out. ``changes`` counts objects
    (``clipped``, ``widened``, ``simplified``, conversions) and pictures (turned, scaled) by what was done.
    """

    folder: Path
    splits: Mapping[str, SplitCount]
    num_images_left_out: int
    num_objects_left_out: int
    problems: tuple[ImportProblem, ...]
    num_objects_of_left_out_images: int = 0
    changes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_clipped(self) -> int:
        return self.changes.get("clipped", 0)

    @property
    def num_simplified(self) -> int:
        return self.changes.get("simplified", 0)

    @property
    def num_converted(self) -> int:
        """Objects that another kind of shape was made of: masks, parts, circles, thin polygons."""
        return sum(count for name, count in self.changes.items() if " to " in name and "picture" not in name)


def describe_summary(summary: ImportSummary) -> str:
    """Return the summary as lines for a terminal: splits, classes, changes, what was left out and why."""
    lines = [
        f"{split}: {count.num_images} images, {count.num_objects} objects"
        for split, count in summary.splits.items()
    ]
    lines += _class_lines(summary.splits)
    lines += [f"note: {note}" for note in summary.notes]
    lines.append(
        f"clipped: {summary.num_clipped}, simplified: {summary.num_simplified}, "
        f"converted: {summary.num_converted}"
    )
    lines += [f"  {count} x {name}" for name, count in sorted(summary.changes.items())]
    lines.append(
        f"left out: {summary.num_images_left_out} images, {summary.num_objects_left_out} objects"
        f" ({summary.num_objects_of_left_out_images} of them on those images)"
    )
    return "\n".join([*lines, *list_problems(summary.problems), f"written to {summary.folder}"])


def _class_lines(splits: Mapping[str, SplitCount]) -> list[str]:
    """Return a table of objects by class and split, most frequent first."""
    totals: Counter[str] = Counter()
    for count in splits.values():
        totals.update(count.objects_by_class)
    if not totals:
        return []
    shown = totals.most_common(MAX_CLASSES)
    width = max(len("class"), *(len(name) for name, _ in shown))
    head = "  ".join(f"{split:>8}" for split in splits)
    lines = [f"{'class':{width}}  {head}"]
    for name, _ in shown:
        row = "  ".join(f"{count.objects_by_class.get(name, 0):>8}" for count in splits.values())
        lines.append(f"{name:{width}}  {row}")
    if len(totals) > len(shown):
        lines.append(f"and {len(totals) - len(shown)} classes more")
    return lines


def list_problems(problems: Sequence[ImportProblem]) -> list[str]:
    """Return a line for each kind of problem with its count, then the first MAX_SHOWN problems."""
    counts = Counter(problem.kind for problem in problems)
    lines = [f"  {count} x {kind}" for kind, count in sorted(counts.items())]
    lines += [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"  and {len(problems) - MAX_SHOWN} more")
    return lines
