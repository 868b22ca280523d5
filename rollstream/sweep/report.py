"""Shows a sweep: one table for the terminal, one page with plots. Pure renderers of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollstream.show.report.page import render_page
from rollstream.show.report.phrases import NOT_WRITTEN, reasons
from rollstream.show.visible_text import one_line
from rollstream.sweep.figures import sweep_plots
from rollstream.sweep.grid import Block, Cell, Grid, short_key, yaml_text
from rollstream.sweep.numbers import CellNumbers

_TEMPLATE: Final = "assets/sweep.html.j2"
COLUMNS: Final = (
    ("idle", "share of the learner's time spent waiting"),
    ("depth", "ready packs of a rank, mean while the learner made steps"),
    ("skip", "B steps run as A because the queue was short"),
    ("lag", "policy versions behind when claimed: mean / highest"),
    ("drop", "rollouts dropped, all reasons"),
    ("roll/s", "rollouts written a second"),
    ("tok/s", "tokens through the learner a second"),
    ("step/s", "optimizer steps a second"),
    ("B", "realised share of B steps"),
    ("F1", "on the validation set, after"),
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as far as it got: ``numbers`` and ``failures`` (in words) by the name of a cell."""

    name: str
    steps: int
    grid: Grid
    numbers: Mapping[str, CellNumbers] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    start_f1: float | None = None

    @property
    def num_done(self) -> int:
        return sum(cell.name in self.numbers for cell in self.grid.cells)

    @property
    def about(self) -> str:
        """One line: how much of the sweep there is, and where it started from."""
        start = "" if self.start_f1 is None else f", start model F1 {self.start_f1:.3f}"
        return f"{self.num_done} of {len(self.grid.cells)} cells, {self.steps} steps each{start}"

    def state_of(self, cell: Cell) -> str:
        """Return why a cell has no numbers: ``failed`` with its reason, or ``not run yet``."""
        failure = self.failures.get(cell.name)
        return f"failed: {failure}" if failure is not None else "not run yet"


def numbers_row(numbers: CellNumbers | None) -> list[str]:
    """Return the texts under COLUMNS; dashes for what is not known."""
    if numbers is None:
        return [NOT_WRITTEN] * len(COLUMNS)
    return [
        _format(numbers.idle_share, "{:.0%}"),
        _format(numbers.mean_depth, "{:.1f}"),
        str(numbers.num_skipped),
        NOT_WRITTEN if numbers.lag_mean is None else f"{numbers.lag_mean:.1f}/{numbers.lag_max}",
        str(numbers.num_dropped),
        _format(numbers.rollouts_per_s, "{:.1f}"),
        _format(numbers.tokens_per_s, "{:.0f}"),
        _format(numbers.steps_per_s, "{:.2f}"),
        _format(numbers.realised_b_ratio, "{:.2f}"),
        _format(numbers.f1, "{:.2f}"),
    ]


def render_sweep(sweep: Sweep) -> RenderableType:
    """Return the table of a sweep, readable at 80 columns: a part for each block, then what was dropped."""
    parts: list[RenderableType] = [Text(f"sweep {one_line(sweep.name, 60)}: {sweep.about}", style="bold")]
    for block in sweep.grid.blocks:
        parts += [Text(""), Text(one_line(block.title, 78), style="bold"), _block_table(sweep, block)]
    notes = [(cell, note) for cell in sweep.grid.cells if (note := _cell_note(sweep, cell))]
    if notes:
        parts.append(Text(""))
        parts += [Text(f"{cell.name}: {one_line(note, 400)}", style="dim") for cell, note in notes]
    return Group(*parts)


def render_sweep_page(sweep: Sweep) -> str:
    """Return one HTML page that needs nothing else: table and plots of every block, and what was dropped."""
    return render_page(
        _TEMPLATE,
        name=one_line(sweep.name, 80),
        about=sweep.about,
        blocks=[
            {
                "title": block.title,
                "keys": block.keys,
                "titles": COLUMNS,
                "rows": [
                    {
                        "values": [yaml_text(value) for _, value in cell.values],
                        "numbers": numbers_row(sweep.numbers.get(cell.name)),
                        "depths": _depths(sweep.numbers.get(cell.name)),
                        "note": _cell_note(sweep, cell),
                    }
                    for cell in block.cells
                ],
                "plots": [
                    (plot, Markup(plot.svg))
                    for plot in sweep_plots(block, sweep.numbers, start_f1=sweep.start_f1, prefix=f"b{index}")
                ],
            }
            for index, block in enumerate(sweep.grid.blocks)
        ],
    )


def _block_table(sweep: Sweep, block: Block) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for key in block.keys:
        table.add_column(Text(_in_lines(short_key(key))), overflow="fold", vertical="bottom", min_width=6)
    for title, _ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom", min_width=5)
    for cell in block.cells:
        values = [Text(yaml_text(value), style="bold") for _, value in cell.values]
        table.add_row(*values, *numbers_row(sweep.numbers.get(cell.name)))
    return table


def _in_lines(key: str) -> str:
    """Return a key with a line break after each part of its name, so that its column stays narrow."""
    return key.replace("_", "_\n")


def _cell_note(sweep: Sweep, cell: Cell) -> str:
    """Return what a row has no room for: reasons of drops and rejections, a failure; empty for nothing."""
    numbers = sweep.numbers.get(cell.name)
    if numbers is None:
        return sweep.state_of(cell)
    said = []
    if numbers.drops:
        said.append(f"dropped {reasons(numbers.drops)}")
    if numbers.rejects:
        said.append(f"rejected {reasons(numbers.rejects)}")
    if numbers.balanced is False:
        said.append("its audit does NOT balance")
    return "; ".join(said)


def _depths(numbers: CellNumbers | None) -> str:
    return "" if numbers is None else ", ".join(f"{depth:.1f}" for depth in numbers.mean_depths)


def _format(value: float | None, shape: str) -> str:
    return NOT_WRITTEN if value is None else shape.format(value)
