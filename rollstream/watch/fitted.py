"""The tables of the live view that fit themselves to the terminal: as many steps as its height holds, and
fewer columns, with whole heads, where it is narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rollstream.run_folder import Row
from rollstream.show.report.counting import count, number
from rollstream.show.report.phrases import NOT_WRITTEN, decimal, whole
from rollstream.show.visible_text import one_line
from rollstream.watch.bottleneck import depths

NUM_STEPS_WITHOUT_HEIGHT: Final = 6
FRAME_LINES: Final = 2
HEAD_LINES: Final = 2
NARROW_COLUMNS: Final = 74


@dataclass(frozen=True, kw_only=True)
class _Column:
    """``least_width``: of the inside of the frame, below which the column is left out."""

    title: str
    justify: Literal["left", "center", "right"]
    least_width: int
    cell: Callable[[Row], str | Text]


def flow_table(sample: Row, queue_limit: int | None) -> RenderableType:
    """Show the way of the rollouts: where how many of them are."""
    per_rank = depths(sample)
    limit = f" (limit {queue_limit})" if queue_limit is not None and per_rank else ""
    ready = " ".join(str(depth) for depth in per_rank) or NOT_WRITTEN
    return _Flow(
        (
            ("asked for", _shown(sample, "requested")),
            ("in flight", _shown(sample, "in_flight")),
            ("to match", _shown(sample, "segments_waiting")),
            ("to pack", _shown(sample, "matched_waiting")),
            ("ready per rank", f"{ready}{limit}"),
            ("trained", _shown(sample, "trained_segments")),
        )
    )


@dataclass(frozen=True)
class _Flow:
    """Titles above their numbers, or side by side where that is too wide."""

    cells: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < NARROW_COLUMNS:
            table = Table.grid(padding=(0, 1))
            for title, value in self.cells:
                table.add_row(Text(title, style="dim"), Text(value, style="bold"))
            yield table
            return
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
        for title, _ in self.cells:
            table.add_column(Text(title), justify="center", header_style="dim", no_wrap=True)
        table.add_row(*(Text(value, style="bold") for _, value in self.cells))
        yield table


@dataclass(frozen=True)
class PairsTable:
    """Rows of two names with their numbers; one below the other where it is narrow."""

    rows: Sequence[tuple[str, str, str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_narrow = options.max_width < NARROW_COLUMNS
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(1 if is_narrow else 2):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, ratio=1)
        for row in self.rows:
            for part in (row[:2], row[2:]) if is_narrow else (row,):
                table.add_row(*part)
        yield table


@dataclass(frozen=True)
class FittedSteps:
    """``above``, and under it the latest steps, newest first: as many as the terminal has lines left."""

    above: Sequence[RenderableType]
    steps: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self.above)
        if not self.steps:
            yield Text("no step yet", style="dim")
            return
        yield _decisions(self.steps[-self._num_shown(console, options) :], options.max_width)

    def _num_shown(self, console: Console, options: ConsoleOptions) -> int:
        height = options.height or (console.size.height if console.is_terminal else None)
        if height is None:
            return NUM_STEPS_WITHOUT_HEIGHT
        free = options.update(height=None)
        used = sum(len(console.render_lines(part, free, pad=False)) for part in self.above)
        inside = height if options.height else height - FRAME_LINES
        return max(inside - used - HEAD_LINES, 1)


def _decisions(steps: Sequence[Row], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    columns = [column for column in _COLUMNS if width >= column.least_width]
    for column in columns:
        table.add_column(column.title, justify=column.justify, header_style="dim", no_wrap=True)
    for row in reversed(steps):
        table.add_row(*(column.cell(row) for column in columns))
    return table


def _kind(row: Row) -> str:
    return one_line(str(row.get("kind", "?")), 4)


def _kind_cell(row: Row) -> Text:
    return Text(_kind(row), style="bold cyan" if _kind(row) == "B" else "")


def _reason_cell(row: Row) -> Text:
    reason = one_line(str(row.get("reason", "")), 14)
    return Text(reason, style="yellow" if _kind(row) == "A" and reason != "schedule" else "")


def _lag_cell(row: Row) -> str:
    return decimal(number(row, "lag_claimed_mean")) if _kind(row) == "B" else NOT_WRITTEN


def _fill_cell(row: Row) -> str:
    return f"{number(row, 'fill') or 0:.0%}" if _kind(row) == "B" else NOT_WRITTEN


def _seconds(row: Mapping[str, Any], name: str) -> str:
    value = number(row, name)
    return NOT_WRITTEN if value is None else f"{value:.2f}"


def _shown(row: Mapping[str, Any], name: str) -> str:
    return whole(count(row, name))


_COLUMNS: Final = (
    _Column(title="step", justify="right", least_width=0, cell=lambda row: _shown(row, "optimizer_step")),
    _Column(title="kind", justify="center", least_width=0, cell=_kind_cell),
    _Column(title="because", justify="left", least_width=0, cell=_reason_cell),
    _Column(title="loss", justify="right", least_width=36, cell=lambda row: decimal(number(row, "loss"))),
    _Column(title="segments", justify="right", least_width=74, cell=lambda row: _shown(row, "num_segments")),
    _Column(title="lag", justify="right", least_width=54, cell=_lag_cell),
    _Column(title="fill", justify="right", least_width=62, cell=_fill_cell),
    _Column(title="wait s", justify="right", least_width=46, cell=lambda row: _seconds(row, "wait_s")),
    _Column(title="busy s", justify="right", least_width=70, cell=lambda row: _seconds(row, "busy_s")),
)
