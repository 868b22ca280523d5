"""Turns a matplotlib figure into inline SVG whose colours are CSS variables of the page around it.

Figures are made without pyplot, so that nothing global is kept between reports. The page decides light or
dark: a figure is drawn in stand-in colours, which are replaced by ``var(--…)``.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rollstream.show.visible_text import visible_text

INK: Final = "#010203"
MUTED: Final = "#010204"
GRID: Final = "#010205"
SERIES: Final = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
LIMIT: Final = "#010221"
_VARIABLES: Final = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    LIMIT: "var(--limit)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(SERIES)},
}
_SETTINGS: Final = {"svg.fonttype": "none", "svg.hashsalt": "rollstream", "font.size": 9.0}
_FONT: Final = re.compile(r"font: ([\d.]+px) [^;\"]*")
_ID: Final = re.compile(r'(\bid="|\bhref="#|url\(#)')


def new_figure(width_in: float = 5.6, height_in: float = 2.5) -> tuple[Figure, Axes]:
    """Return a figure of the report's look with one empty pair of axes."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    return figure, axes


def label_axes(axes: Axes, *, x: str = "", y: str = "") -> None:
    """Name the axes and place a legend above them where there is something to tell apart."""
    drawn: Any = axes
    if x == "optimizer step":
        drawn.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    drawn.set_xlabel(x, color=MUTED, fontsize=8.5)
    drawn.set_ylabel(y, color=MUTED, fontsize=8.5)
    handles, labels = drawn.get_legend_handles_labels()
    if labels:
        box = drawn.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=min(len(labels), 4),
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
            handlelength=1.3,
            borderaxespad=0.2,
            columnspacing=1.4,
        )
        for text in box.get_texts():
            text.set_parse_math(False)
    for text in (*drawn.get_xticklabels(), *drawn.get_yticklabels()):
        text.set_parse_math(False)


def to_inline_svg(figure: Figure, *, name: str, alt: str) -> str:
    """Return ``<svg role="img">`` for a page that may hold many of them.

    ``name`` (letters, digits, hyphens) is set before every id inside, ``alt`` is what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Text stays text and is drawn with the reader's fonts: ours only measure it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = _FONT.sub(r"font-size: \1", text)
    text = _ID.sub(rf"\g<1>{name}-", text)
    opening, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', opening)
    assert view is not None, "matplotlib wrote an svg without a view box"
    title = html.escape(visible_text(alt))
    return f'<svg class="plot" role="img" aria-label="{title}" {view[0]}><title>{title}</title>{rest}'
