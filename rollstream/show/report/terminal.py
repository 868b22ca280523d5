"""Renders the key numbers of a report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rollstream.show.report import phrases
from rollstream.show.report.data import ReportData
from rollstream.show.visible_text import one_line


def render_terminal(data: ReportData) -> RenderableType:
    """Return the same key numbers as the page, readable at 80 columns."""
    parts: list[RenderableType] = [_numbers(data)]
    if data.evaluations:
        parts.append(_evaluations(data))
    if data.audit:
        parts.append(_audit(data))
    if data.missing:
        parts.append(
            Text("missing: " + "; ".join(one_line(item, 160) for item in data.missing), style="yellow")
        )
    return Group(*parts)


def _numbers(data: ReportData) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for line in (*phrases.headlines(data), *phrases.detail_lines(data.numbers)):
        table.add_row(Text(line.name), Text(line.value), Text(line.remark, style="dim"))
    about = ", ".join(
        (one_line(data.variant, 30), one_line(data.model, 40), phrases.duration(data.numbers.duration_s))
    )
    return Panel(
        Group(Text(about, style="dim"), table),
        title=Text(f"run {one_line(data.run_name, 50)}", style="bold"),
        title_align="left",
        box=box.ROUNDED,
    )


def _evaluations(data: ReportData) -> RenderableType:
    titles, rows = phrases.evaluation_lines(data)
    tables = [_titled("evaluation", titles, rows)]
    if classes := phrases.class_lines(data)[1]:
        tables.append(_titled("by class", phrases.class_lines(data)[0], classes))
    return Group(*tables)


def _titled(name: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _audit(data: ReportData) -> RenderableType:
    title = Text(f"audit, {data.audit_note}" if data.audit_note else "audit")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    styles = {"good": "green", "bad": "bold red", "": ""}
    for line in data.audit:
        table.add_row(
            Text("  " * line.depth + one_line(line.name, 160)),
            Text(one_line(line.value, 40), style=styles[line.verdict]),
        )
    return table
