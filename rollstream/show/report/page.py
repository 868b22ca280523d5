"""Renders a report as one HTML page that needs nothing else: no script, font or outside address."""

from __future__ import annotations

from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rollstream.show.report import phrases
from rollstream.show.report.data import ReportData
from rollstream.show.report.figures import all_plots
from rollstream.show.report.pictures import example_rows
from rollstream.show.visible_text import one_line, visible_text

_TEMPLATE: Final = "assets/report.html.j2"
_STYLE: Final = "assets/report.css"


def render_html(data: ReportData) -> str:
    """Return the whole page; every text of the run is escaped, plots and pictures are inline."""
    titles, rows = phrases.evaluation_lines(data)
    class_titles, class_rows = phrases.class_lines(data)
    return render_page(
        _TEMPLATE,
        run_name=one_line(data.run_name, 80),
        variant=one_line(data.variant, 60),
        model=one_line(data.model, 120),
        started=phrases.started(data.started_at_ms),
        duration=phrases.duration(data.numbers.duration_s),
        headlines=phrases.headlines(data),
        details=phrases.detail_lines(data.numbers),
        evaluation_titles=titles,
        evaluation_rows=rows,
        class_titles=class_titles,
        class_rows=class_rows,
        plots=[(plot, Markup(plot.svg)) for plot in all_plots(data)],
        examples=example_rows(data.before_and_after),
        audit=data.audit,
        audit_note=data.audit_note,
        missing=data.missing,
    )


def render_page(template: str, **values: Any) -> str:
    """Return a page of the reports' look; ``template`` is a file of this package and gets ``style``.

    Every text is escaped and made visible; plots and pictures come as markup of our own.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    style = Markup(_asset(_STYLE))
    return environment.from_string(_asset(template)).render(style=style, **values)


def _asset(name: str) -> str:
    return resources.files("rollstream").joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """Make every text that the template prints visible; plots are markup of our own and stay as they are."""
    return visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
