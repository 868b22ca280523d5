"""The plots of one block of a sweep, in the look of a run's report. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes

from rollstream.show.report.figures import Plot
from rollstream.show.report.inline_svg import LIMIT, MUTED, SERIES, label_axes, new_figure, to_inline_svg
from rollstream.show.visible_text import one_line
from rollstream.sweep.grid import Block, Cell, Scalar, short_key, yaml_text
from rollstream.sweep.numbers import CellNumbers

_B_RATIO_KEY: Final = "b_ratio"
_LONGEST_TICK: Final = 14


@dataclass(frozen=True)
class Measure:
    """One number of a cell and how it is plotted; ``name`` is part of the plot's ids.

    ``spread`` is its name among the cell's spreads, empty for a number without one.
    """

    name: str
    title: str
    unit: str
    value: Callable[[CellNumbers], float | None]
    shape: str = "{:.2g}"
    spread: str = ""

    def spread_of(self, numbers: CellNumbers) -> float | None:
        """Return how far the number is known, in its unit; None where that is not known."""
        return numbers.spreads.get(self.spread)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot: places on the x axis with their values, and its name (empty for the only one)."""

    name: str
    places: tuple[int, ...]
    values: tuple[float, ...]


_VERSIONS: Final = "policy versions"
MEASURES: Final = (
    Measure("idle", "Learner idle", "share of time", lambda item: item.idle_share, "{:.0%}", "idle_share"),
    Measure(
        "depth", "Ready packs per rank", "packs, mean", lambda item: item.mean_depth, spread="mean_depth"
    ),
    Measure("skips", "B steps skipped, queue short", "steps", lambda item: item.num_skipped, "{:.0f}"),
    Measure("lag", "Lag when claimed, mean", _VERSIONS, lambda item: item.lag_mean, spread="lag_mean"),
    Measure("lag-max", "Lag when claimed, highest", _VERSIONS, lambda item: item.lag_max, "{:.0f}"),
    Measure("drops", "Rollouts dropped", "rollouts", lambda item: item.num_dropped, "{:.0f}"),
    Measure(
        "rollouts", "Rollouts written", "a second", lambda item: item.rollouts_per_s, spread="rollouts_per_s"
    ),
    Measure(
        "tokens",
        "Tokens through the learner",
        "a second",
        lambda item: item.tokens_per_s,
        "{:.0f}",
        "tokens_per_s",
    ),
    Measure("steps", "Optimizer steps", "a second", lambda item: item.steps_per_s, spread="steps_per_s"),
    Measure(
        "b-ratio",
        "Realised share of B steps",
        "share",
        lambda item: item.realised_b_ratio,
        spread="realised_b_ratio",
    ),
    Measure("f1", "F1 after", "F1", lambda item: item.f1, "{:.3f}"),
)


def sweep_plots(
    block: Block, numbers: Mapping[str, CellNumbers], *, start_f1: float | None, prefix: str
) -> list[Plot]:
    """Return a plot for each measure; ``prefix`` keeps the ids of several blocks on one page apart."""
    return [_plot(block, numbers, measure, start_f1, f"{prefix}-{measure.name}") for measure in MEASURES]


def lines_of(
    block: Block, numbers: Mapping[str, CellNumbers], value: Callable[[CellNumbers], float | None]
) -> tuple[list[str], list[Line]]:
    """Return the names of the places on the x axis, and the lines over them, without cells of no value.

    A product of two keys gives a line for each value of the second; any other block one line over its cells.
    """
    known = {
        cell.name: float(found)
        for cell in block.cells
        if cell.name in numbers and (found := value(numbers[cell.name])) is not None
    }
    if block.is_product and len(block.keys) == 2:
        first, second = (_distinct(cell.values[at][1] for cell in block.cells) for at in (0, 1))
        lines = [
            _line(
                [cell for cell in block.cells if cell.values[1][1] == other],
                known,
                [first.index(cell.values[0][1]) for cell in block.cells if cell.values[1][1] == other],
                f"{short_key(block.keys[1])} {yaml_text(other)}",
            )
            for other in second
        ]
        return [yaml_text(item) for item in first], [line for line in lines if line.places]
    line = _line(block.cells, known, range(len(block.cells)), "")
    return [cell.label for cell in block.cells], [line] if line.places else []


def _line(cells: Sequence[Cell], known: Mapping[str, float], places: Sequence[int], name: str) -> Line:
    pairs = [
        (place, known[cell.name]) for cell, place in zip(cells, places, strict=True) if cell.name in known
    ]
    return Line(name=name, places=tuple(at for at, _ in pairs), values=tuple(found for _, found in pairs))


def _plot(
    block: Block, numbers: Mapping[str, CellNumbers], measure: Measure, start_f1: float | None, name: str
) -> Plot:
    ticks, lines = lines_of(block, numbers, measure.value)
    if not lines:
        return Plot(title=measure.title, note="no cell with this number yet")
    _, spreads = lines_of(block, numbers, measure.spread_of)
    bars = {spread.name: dict(zip(spread.places, spread.values, strict=True)) for spread in spreads}
    figure, axes = new_figure()
    style = "-" if block.is_product else ""
    for index, line in enumerate(lines):
        colour = SERIES[index % len(SERIES)]
        _draw_spread(axes, line, bars.get(line.name, {}), index)
        axes.plot(
            line.places,
            line.values,
            f"{style}o",
            color=colour,
            linewidth=1.8,
            markersize=5,
            label=one_line(line.name, 30) or None,
        )
        if len(lines) == 1:
            _write_values(axes, line, measure.shape)
    _draw_reference(axes, block, measure, start_f1)
    _set_axes(axes, ticks, block, measure)
    note = "; ".join(_said(line, ticks, measure.shape) for line in lines)
    return Plot(
        title=measure.title,
        note=note,
        svg=to_inline_svg(figure, name=name, alt=f"{measure.title}: {note}"),
    )


def _draw_spread(axes: Axes, line: Line, bars: Mapping[int, float], index: int) -> None:
    """Draw how far each value of ``line`` is known as a bar through it, where ``bars`` knows, by place."""
    drawn: Any = axes
    known = [
        (place, value, bars[place])
        for place, value in zip(line.places, line.values, strict=True)
        if place in bars
    ]
    if known:
        places, values, halves = zip(*known, strict=True)
        drawn.errorbar(
            places,
            values,
            yerr=halves,
            fmt="none",
            ecolor=SERIES[index % len(SERIES)],
            elinewidth=1.2,
            capsize=3,
            gid=f"spread-{index}",
        )


def _draw_reference(axes: Axes, block: Block, measure: Measure, start_f1: float | None) -> None:
    """Draw what a measure is compared with: the ratio that was asked for, the start model's F1."""
    drawn: Any = axes
    dashes = (0, (4, 3))
    if measure.name == "f1" and start_f1 is not None:
        drawn.axhline(start_f1, color=LIMIT, linewidth=1.2, linestyle=dashes, label="start model")
    asked = [
        (at, float(value))
        for at, cell in enumerate(block.cells)
        for key, value in cell.values
        if short_key(key) == _B_RATIO_KEY
    ]
    if measure.name == "b-ratio" and len(block.keys) == 1 and asked:
        places, ratios = [at for at, _ in asked], [ratio for _, ratio in asked]
        drawn.plot(places, ratios, color=LIMIT, linewidth=1.2, linestyle=dashes, label="asked for")


def _set_axes(axes: Axes, ticks: Sequence[str], block: Block, measure: Measure) -> None:
    drawn: Any = axes
    drawn.set_xticks(range(len(ticks)), [one_line(tick, _LONGEST_TICK) for tick in ticks])
    drawn.set_xlim(-0.4, len(ticks) - 0.6)
    # from zero on: an axis cut to the values makes the noise of single runs look like an effect
    drawn.set_ylim(0, max(drawn.get_ylim()[1] * 1.12, 1e-3))
    is_crossed = block.is_product and len(block.keys) == 2
    label_axes(axes, x=short_key(block.keys[0]) if is_crossed else block.axis, y=measure.unit)


def _write_values(axes: Axes, line: Line, shape: str) -> None:
    drawn: Any = axes
    for place, found in zip(line.places, line.values, strict=True):
        drawn.annotate(
            shape.format(found),
            (place, found),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=8.5,
        )


def _said(line: Line, ticks: Sequence[str], shape: str) -> str:
    values = ", ".join(
        f"{ticks[place]}: {shape.format(found)}"
        for place, found in zip(line.places, line.values, strict=True)
    )
    return f"{line.name} – {values}" if line.name else values


def _distinct(values: Any) -> list[Scalar]:
    return list(dict.fromkeys(values))
