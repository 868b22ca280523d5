"""Shows the learning bench: tables for the terminal, one page, one map. Pure: it shows what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from broker_schemas.method.evaluation_numbers import words_of
from rollstream.bench.learning_arms import ALONE, Arm, Cell
from rollstream.bench.learning_numbers import CellResult, Estimate, against, over_seeds
from rollstream.show.report.page import render_page
from rollstream.show.report.phrases import NOT_WRITTEN
from rollstream.show.visible_text import one_line

_TEMPLATE: Final = "assets/learning.html.j2"
SCORES: Final = {"AP50": "map_50", "F1": "f1_class_50", "F1 any class": "f1_50", "names": "label_accuracy"}
COUNTS: Final = {"written": "pred_objects", "missed": "fn", "unmatched": "fp", "repeated": "duplicates"}
COMPARED: Final = {
    "AP50": "map_50",
    "F1": "f1_class_50",
    "missed": "fn",
    "repeated": "duplicates",
}
SHARES: Final = frozenset(SCORES.values())
EXPLAINED: Final = (
    "± is half of the 95 % interval over seeds (Student's t); "
    "* marks a difference whose interval leaves out 0."
)


@dataclass(frozen=True, kw_only=True)
class LearningBench:
    """The bench as far as it got. ``results`` and ``failures`` (in words) by the name of a cell.

    ``start``: the numbers of the checkpoint that every run began from. ``gate``: IoU of a match.
    """

    name: str
    steps: int
    gate: float
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    results: Mapping[str, CellResult] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)

    def by_seed(self, arm: Arm) -> dict[int, CellResult]:
        """Return the finished runs of an arm."""
        cells = [cell for cell in self.cells if cell.arm == arm and cell.name in self.results]
        return {cell.seed: self.results[cell.name] for cell in cells}

    @property
    def about(self) -> str:
        """One line: how much of it there is, and of which size."""
        seeds = sorted({cell.seed for cell in self.cells})
        done = sum(cell.name in self.results for cell in self.cells)
        truth = self.start.get("gt_objects")
        objects = "" if truth is None else f", {truth:g} objects to find"
        return (
            f"{done} of {len(self.cells)} runs, {self.steps} steps, seeds {seeds[0]} to {seeds[-1]}{objects}"
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table: ``titles`` of its columns, each row an arm's title and a text under every title."""

    title: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    explained: tuple[tuple[str, str], ...] = ()


def parts_of(bench: LearningBench) -> tuple[Part, ...]:
    """Return the tables: scores, counts of objects, what was trained, and differences to A alone."""
    return (
        _numbers_part(bench, "scores on the validation set", SCORES),
        _numbers_part(bench, "objects on the validation set", COUNTS),
        _trained_part(bench),
        _differences_part(bench),
    )


def render_learning(bench: LearningBench) -> RenderableType:
    """Return the tables, readable at 80 columns."""
    lines: list[RenderableType] = [
        Text(f"learning bench {one_line(bench.name, 40)}", style="bold"),
        Text(bench.about),
    ]
    for part in parts_of(bench):
        lines += [Text(""), _table(part)]
    lines += [Text(""), Text(EXPLAINED, style="dim")]
    lines += [Text(f"{name}: {one_line(why, 400)}", style="red") for name, why in bench.failures.items()]
    return Group(*lines)


def render_learning_page(bench: LearningBench) -> str:
    """Return one HTML page that needs nothing else."""
    return render_page(
        _TEMPLATE,
        name=one_line(bench.name, 80),
        about=bench.about,
        explained=EXPLAINED,
        parts=parts_of(bench),
        failures=[f"{name}: {one_line(why, 400)}" for name, why in bench.failures.items()],
    )


def learning_json(bench: LearningBench) -> dict[str, Any]:
    """Return everything as one map: each run, each arm over its seeds, each difference to A alone."""
    alone = bench.by_seed(ALONE)
    cells = [
        {
            "cell": cell.name,
            "arm": cell.arm.title,
            "seed": cell.seed,
            "failure": bench.failures.get(cell.name),
            "result": bench.results[cell.name].to_json() if cell.name in bench.results else None,
        }
        for cell in bench.cells
    ]
    arms = [
        {
            "arm": arm.title,
            "overrides": list(arm.overrides),
            "over_seeds": _estimates(lambda name, own=bench.by_seed(arm): over_seeds(own, name)),
            "above_a": _estimates(lambda name, own=bench.by_seed(arm): against(own, alone, name)),
        }
        for arm in bench.arms
    ]
    return {"name": bench.name, "max_steps": bench.steps, "start": bench.start, "arms": arms, "cells": cells}


def _estimates(of: Any) -> dict[str, dict[str, float | None] | None]:
    names = [*SCORES.values(), *COUNTS.values()]
    found: dict[str, Estimate | None] = {name: of(name) for name in names}
    return {name: asdict(value) if value is not None else None for name, value in found.items()}


def _numbers_part(bench: LearningBench, title: str, columns: Mapping[str, str]) -> Part:
    start = ("start", *(_plain(bench.start.get(name), name) for name in columns.values()))
    rows = [
        (arm.title, *(_shown(over_seeds(bench.by_seed(arm), name), name) for name in columns.values()))
        for arm in bench.arms
    ]
    return Part(
        title=title,
        titles=("run", *columns),
        rows=(start, *rows),
        explained=tuple((column, words_of(name, bench.gate)) for column, name in columns.items()),
    )


def _trained_part(bench: LearningBench) -> Part:
    rows: list[tuple[str, ...]] = []
    for arm in bench.arms:
        results = list(bench.by_seed(arm).values())
        if not results:
            rows.append((arm.title, *(NOT_WRITTEN,) * 5))
            continue
        amounts = [
            sum(getattr(result, name) for result in results) / len(results)
            for name in ("num_steps", "num_b_steps", "num_tokens", "train_s")
        ]
        rows.append((arm.title, str(len(results)), *(f"{amount:,.0f}" for amount in amounts)))
    return Part(
        title="trained, mean of the seeds", titles=("run", *TRAINED), rows=tuple(rows), explained=_TRAINED
    )


TRAINED: Final = ("seeds", "steps", "B steps", "tokens", "seconds")
_TRAINED: Final = (
    ("B steps", "optimizer steps on rollouts"),
    ("seconds", "spent in optimizer steps, waiting included"),
)


def _differences_part(bench: LearningBench) -> Part:
    alone = bench.by_seed(ALONE)
    rows = [
        (
            arm.title,
            *(_difference(against(bench.by_seed(arm), alone, name), name) for name in COMPARED.values()),
        )
        for arm in bench.arms
        if arm != ALONE
    ]
    return Part(title="above A, seed for seed", titles=("run", *COMPARED), rows=tuple(rows))


def _shown(found: Estimate | None, name: str) -> str:
    if found is None:
        return NOT_WRITTEN
    width = "" if found.half_width is None else f" ±{_plain(found.half_width, name)}"
    return f"{_plain(found.mean, name)}{width}"


def _difference(found: Estimate | None, name: str) -> str:
    if found is None:
        return NOT_WRITTEN
    sign = "+" if found.mean >= 0 else ""
    return f"{sign}{_shown(found, name)}{'*' if found.is_apart_from_zero else ''}"


def _plain(value: float | None, name: str) -> str:
    if value is None:
        return NOT_WRITTEN
    return f"{value:.3f}" if name in SHARES else f"{value:.1f}"


def _table(part: Part) -> Table:
    table = Table(
        title=part.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for index, title in enumerate(part.titles):
        table.add_column(title, justify="right" if index else "left", overflow="fold", min_width=5)
    for row in part.rows:
        table.add_row(*(Text(text) for text in row))
    return table
