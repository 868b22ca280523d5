"""The plots of a report, each an inline SVG with a title and words for those who cannot see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rollstream.show.report.counting import counts, number, total
from rollstream.show.report.data import ReportData, Row
from rollstream.show.report.inline_svg import LIMIT, MUTED, SERIES, label_axes, new_figure, to_inline_svg
from rollstream.show.report.series import Clock, points, running_mean, thin
from rollstream.show.visible_text import one_line

_METRIC_TITLES: Final = {
    "f1": "F1\nany class\nat the gate",
    "f1_50": "F1\nany class\nIoU 0.5",
    "f1_class_50": "F1\nright class\nIoU 0.5",
    "label_accuracy": "labels\nright",
    "map_50": "AP50\nright class",
    "map": "AP\nright class",
}
_COMPARED: Final = tuple(_METRIC_TITLES)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot: ``svg`` is empty where there is nothing to draw, and ``note`` then says why."""

    title: str
    note: str
    svg: str = ""


def all_plots(data: ReportData) -> list[Plot]:
    """Return the plots of a report in reading order."""
    return [
        evaluation_plot(data),
        loss_plot(data.steps),
        depth_plot(data.samples, data.queue_limit),
        lag_plot(data),
        wait_busy_plot(data.steps),
        fill_plot(data.steps),
        drops_plot(data),
        throughput_plot(data.samples),
    ]


def loss_plot(steps: Sequence[Row]) -> Plot:
    """Draw the loss of A and of B steps over optimizer steps: values faint, a running mean strong."""
    title = "Loss by kind of step"
    figure, axes = new_figure()
    said = []
    for kind, colour in (("A", SERIES[0]), ("B", SERIES[1])):
        xs, ys = points([row for row in steps if row.get("kind") == kind], "optimizer_step", "loss")
        if not xs:
            continue
        axes.plot(*thin(xs, ys), ".", color=colour, alpha=0.35, markersize=4)
        smooth = thin(xs, running_mean(ys, 9))
        axes.plot(*smooth, color=colour, linewidth=1.8, label=f"{kind} (mean of 9)")
        said.append(f"{kind} from {ys[0]:.3g} to {ys[-1]:.3g} over {len(ys)} steps")
    if not said:
        return Plot(title=title, note="no step with a loss was logged")
    label_axes(axes, x="optimizer step", y="loss")
    note = "; ".join(said)
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="loss", alt=f"{title}: {note}"))


def depth_plot(samples: Sequence[Row], queue_limit: int | None) -> Plot:
    """Draw the packs waiting for each rank over time, with the queue limit where it is known."""
    title = "Ready packs per rank"
    ranks = max((len(_depths(row)) for row in samples), default=0)
    if not ranks:
        return Plot(title=title, note="no sample of the ready queues was written")
    figure, axes = new_figure()
    clock = Clock.of(samples)
    means = []
    for rank in range(ranks):
        rows = [{**row, "depth": _depths(row)[rank]} for row in samples if len(_depths(row)) > rank]
        xs, ys = clock.timed(rows, "depth")
        if not ys:
            continue
        means.append(f"rank {rank} holds {sum(ys) / len(ys):.1f} on average")
        axes.step(*thin(xs, ys), where="post", color=SERIES[rank % 6], linewidth=1.5, label=f"rank {rank}")
    if queue_limit is not None:
        _limit_line(axes, queue_limit, f"queue limit {queue_limit}")
    _stand_on_zero(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    label_axes(axes, x=clock.unit, y="packs")
    note = "; ".join(means[:8])
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="depth", alt=f"{title}: {note}"))


def lag_plot(data: ReportData) -> Plot:
    """Draw how many policy versions behind rollouts were when generated and when claimed."""
    title = "Policy lag"
    figure, axes = new_figure()
    said = []
    clock = Clock.of([*data.samples, *data.steps])
    xs, ys = clock.timed(data.samples, "lag_generated_mean")
    if ys:
        axes.plot(*thin(xs, ys), color=SERIES[2], linewidth=1.5, label="generated, mean")
        said.append(f"generated {sum(ys) / len(ys):.2f} on average")
    b_steps = [row for row in data.steps if row.get("kind") == "B"]
    xs, ys = clock.timed(b_steps, "lag_claimed_mean")
    if ys:
        axes.plot(*thin(xs, ys), color=SERIES[1], linewidth=1.8, label="claimed, mean")
        said.append(f"claimed {sum(ys) / len(ys):.2f} on average")
    xs, highest = clock.timed(b_steps, "lag_claimed_max")
    if highest:
        axes.plot(*thin(xs, highest, join=max), ".", color=SERIES[1], markersize=4, label="claimed, highest")
        said.append(f"claimed {max(highest):.0f} at most")
    if not said:
        return Plot(title=title, note="no lag was written")
    _stand_on_zero(axes)
    label_axes(axes, x=clock.unit, y="policy versions")
    note = "; ".join(said)
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="lag", alt=f"{title}: {note}"))


def fill_plot(steps: Sequence[Row]) -> Plot:
    """Draw how full the packs of B steps were."""
    title = "Fill of the packs"
    xs, ys = points([row for row in steps if row.get("kind") == "B"], "optimizer_step", "fill")
    if not ys:
        return Plot(title=title, note="no B step with packs was logged")
    figure, axes = new_figure()
    axes.plot(*thin(xs, ys), color=SERIES[3], linewidth=1.5, marker=".", markersize=5)
    axes.set_ylim(0, 1.02)
    label_axes(axes, x="optimizer step", y="share filled")
    note = f"mean {sum(ys) / len(ys):.0%}, lowest {min(ys):.0%}"
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="fill", alt=f"{title}: {note}"))


def wait_busy_plot(steps: Sequence[Row]) -> Plot:
    """Draw waiting on top of busy seconds of every optimizer step, bars of neighbours joined in long runs."""
    title = "Learner: busy and waiting"
    rows = [row for row in steps if number(row, "busy_s") is not None]
    xs, busy = points(rows, "optimizer_step", "busy_s")
    if not busy:
        return Plot(title=title, note="no step with its times was logged")
    waits = [number(row, "wait_s") or 0.0 for row in rows if number(row, "optimizer_step") is not None]
    figure, axes = new_figure()
    thin_xs, thin_busy = thin(xs, busy, largest=120)
    _, thin_wait = thin(xs, waits, largest=120)
    width = 0.85 * (thin_xs[1] - thin_xs[0] if len(thin_xs) > 1 else 1.0)
    axes.bar(thin_xs, thin_busy, width=width, color=SERIES[0], label="busy")
    axes.bar(thin_xs, thin_wait, width=width, bottom=thin_busy, color=SERIES[1], label="waiting")
    label_axes(axes, x="optimizer step", y="seconds")
    waited, worked = total(rows, "wait_s"), total(rows, "busy_s")
    note = f"waited {waited:.1f} s, busy {worked:.1f} s"
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="wait-busy", alt=f"{title}: {note}"))


def evaluation_plot(data: ReportData) -> Plot:
    """Draw F1 with and without classes and AP of the first and the last evaluation side by side."""
    title = "Quality before and after"
    compared = [item for item in data.before_and_after if any(name in item.metrics for name in _COMPARED)]
    if not compared:
        return Plot(title=title, note="no evaluation was written")
    names = [name for name in _COMPARED if any(name in item.metrics for item in compared)]
    figure, axes = new_figure()
    width = 0.8 / len(compared)
    for index, item in enumerate(compared):
        offset = (index - (len(compared) - 1) / 2) * width
        xs = [at + offset for at, name in enumerate(names) if name in item.metrics]
        ys = [item.metrics[name] for name in names if name in item.metrics]
        colour = SERIES[4] if index == 0 and len(compared) > 1 else SERIES[0]
        bars: Any = axes.bar(xs, ys, width=width * 0.92, color=colour, label=one_line(item.label, 24))
        axes.bar_label(bars, fmt="%.2f", padding=2, color=MUTED, fontsize=8.5)
    axes.set_xticks(range(len(names)), [_METRIC_TITLES[name] for name in names])
    axes.set_ylim(0, 1.08)
    label_axes(axes)
    said = [
        f"{item.label}: "
        + ", ".join(
            f"{' '.join(_METRIC_TITLES[n].split())} {item.metrics[n]:.2f}" for n in names if n in item.metrics
        )
        for item in compared
    ]
    note = "; ".join(said)
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="quality", alt=f"{title}: {note}"))


def drops_plot(data: ReportData) -> Plot:
    """Draw what was dropped and rejected, by reason: whole rollouts, and objects inside rollouts."""
    title = "Dropped and rejected, by reason"
    groups = (
        ("dropped", data.numbers.drops, SERIES[1]),
        ("rejected", data.numbers.rejects, SERIES[5]),
        ("objects in parsing", data.numbers.object_drops, SERIES[3]),
    )
    bars = [
        (name, reason, amount, colour) for name, found, colour in groups for reason, amount in found.items()
    ]
    if not bars:
        known = bool(data.samples or data.steps)
        return Plot(title=title, note="nothing was dropped or rejected" if known else "nothing was written")
    bars = bars[:14]
    figure, axes = new_figure(height_in=max(2.5, 0.6 + 0.22 * len(bars)))
    for name, _, colour in groups:
        places = [(at, bar[2]) for at, bar in enumerate(bars) if bar[0] == name]
        if places:
            drawn: Any = axes.barh([at for at, _ in places], [n for _, n in places], color=colour, label=name)
            axes.bar_label(drawn, padding=3, color=MUTED, fontsize=8.5)
    axes.set_yticks(range(len(bars)), [one_line(bar[1], 28) for bar in bars])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    label_axes(axes)
    note = ", ".join(f"{one_line(reason, 40)} {amount}" for _, reason, amount, _ in bars)
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="drops", alt=f"{title}: {note}"))


def throughput_plot(samples: Sequence[Row]) -> Plot:
    """Draw the running counts of rollouts over time: pushed, trained, dropped."""
    title = "Rollouts over time"
    clock = Clock.of(samples)
    rows = [{**row, "all_dropped": sum(counts(row, "dropped").values())} for row in samples]
    figure, axes = new_figure()
    said = []
    for name, label, colour in (
        ("pushed", "written by producers", SERIES[2]),
        ("trained_segments", "trained", SERIES[0]),
        ("all_dropped", "dropped", SERIES[1]),
    ):
        xs, ys = clock.timed(rows, name)
        if ys:
            axes.plot(*thin(xs, ys), color=colour, linewidth=1.8, label=label)
            said.append(f"{label} {ys[-1]:.0f}")
    if not said:
        return Plot(title=title, note="no count of rollouts was written")
    _stand_on_zero(axes)
    label_axes(axes, x=clock.unit, y="rollouts")
    note = "; ".join(said)
    return Plot(title=title, note=note, svg=to_inline_svg(figure, name="rollouts", alt=f"{title}: {note}"))


def _depths(row: Mapping[str, Any]) -> list[Any]:
    found = row.get("ready_depth")
    return found if isinstance(found, list) else []


def _stand_on_zero(axes: Axes) -> None:
    """Let the plot begin just below zero, so that a line along zero is seen."""
    drawn: Any = axes
    highest = max(drawn.get_ylim()[1], 1e-9)
    drawn.set_ylim(-0.02 * highest, highest)


def _limit_line(axes: Axes, height: float, label: str) -> None:
    drawn: Any = axes
    drawn.axhline(height, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
