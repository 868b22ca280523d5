"""The key numbers of a run as lines of words, the same for the page and the terminal. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from broker_schemas.method.evaluation_numbers import NUMBERS, words_of
from rollstream.show.report.data import KeyNumbers, ReportData
from rollstream.show.visible_text import one_line

NOT_WRITTEN: Final = "–"
MOST_CLASSES: Final = 30
HEADLINE_METRIC: Final = "f1_class_50"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One number: what it is, its value, and a remark in small print (may be empty)."""

    name: str
    value: str
    remark: str = ""


def headlines(data: ReportData) -> list[Line]:
    """Return the few numbers that say how the run went, most important first."""
    numbers = data.numbers
    return [
        Line(
            name=words_of(HEADLINE_METRIC),
            value=_last_metric(data, HEADLINE_METRIC),
            remark=_change(data, HEADLINE_METRIC),
        ),
        Line(
            name="optimizer steps",
            value=whole(numbers.num_steps),
            remark=f"{numbers.num_b_steps} rollout (B) steps",
        ),
        Line(
            name="realised B ratio", value=percent(numbers.realised_b_ratio), remark=_schedule_remark(numbers)
        ),
        Line(name="learner idle", value=percent(numbers.idle_share), remark="time spent waiting"),
        Line(name="rollouts", value=rate(numbers.rollouts_per_s), remark="written by producers"),
        Line(name="tokens", value=rate(numbers.tokens_per_s), remark="through the learner"),
    ]


def detail_lines(numbers: KeyNumbers) -> list[Line]:
    """Return the other key numbers in reading order; what was not written shows a dash."""
    dropped, rejected = sum(numbers.drops.values()), sum(numbers.rejects.values())
    known = numbers.rollouts_pushed is not None
    peak = numbers.peak_broker_bytes
    return [
        Line(name="rollouts asked for", value=whole(numbers.rollouts_requested)),
        Line(name="rollouts written", value=whole(numbers.rollouts_pushed)),
        Line(name="rollouts trained", value=whole(numbers.rollouts_trained)),
        Line(name="rollouts dropped", value=whole(dropped if known else None), remark=reasons(numbers.drops)),
        Line(
            name="rollouts rejected",
            value=whole(rejected if known else None),
            remark=reasons(numbers.rejects),
        ),
        Line(name="still asked for at the end", value=whole(numbers.rollouts_in_flight)),
        Line(name="duplicates recognised", value=whole(numbers.duplicates)),
        Line(
            name="B steps skipped",
            value=whole(sum(numbers.skips.values())) if numbers.num_steps else NOT_WRITTEN,
            remark=reasons(numbers.skips),
        ),
        *_advice_lines(numbers),
        Line(
            name="objects dropped in parsing",
            value=whole(sum(numbers.object_drops.values())) if numbers.num_b_steps else NOT_WRITTEN,
            remark=reasons(numbers.object_drops),
        ),
        Line(name="mean fill of packs", value=percent(numbers.mean_fill)),
        Line(name="optimizer steps a second", value=decimal(numbers.steps_per_s)),
        Line(name="last policy version", value=whole(numbers.last_policy_version)),
        Line(name="most memory in the broker", value=NOT_WRITTEN if peak is None else f"{peak / 1e6:.1f} MB"),
        Line(
            name="process restarts",
            value=whole(sum(numbers.restarts.values())) if known else NOT_WRITTEN,
            remark=reasons(numbers.restarts),
        ),
    ]


def _advice_lines(numbers: KeyNumbers) -> list[Line]:
    advice = one_line(numbers.demand_advice, 400)
    return [Line(name="B steps that no demand serves fresh", value="yes", remark=advice)] if advice else []


def evaluation_lines(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows of the evaluations: metric, then one value for each evaluation."""
    shown = data.evaluations[-6:] if len(data.evaluations) > 6 else data.evaluations
    found = dict.fromkeys(name for item in shown for name in item.metrics)
    names = [name for name in NUMBERS if name in found] + [name for name in found if name not in NUMBERS]
    gate = next((item.gate for item in reversed(shown) if item.gate is not None), None)
    titles = ["metric", *(one_line(item.label, 24) for item in shown)]
    rows = [
        [
            words_of(name, gate),
            *(_metric(item.metrics.get(name)) for item in shown),
        ]
        for name in names
    ]
    return titles, rows


def class_lines(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the classes: labelled, written, AP50 of the first and last evaluation."""
    compared = [item for item in data.before_and_after if item.classes]
    if not compared:
        return [], []
    last = compared[-1].classes
    titles = ["class", "labelled", "written", *(f"AP50 {one_line(item.label, 24)}" for item in compared)]
    rows = [
        [
            one_line(name, 40),
            *(_metric(numbers.get(key)) for key in ("gt_objects", "pred_objects")),
            *(_metric(item.classes.get(name, {}).get("map_50")) for item in compared),
        ]
        for name, numbers in list(last.items())[:MOST_CLASSES]
    ]
    if len(last) > MOST_CLASSES:
        rows.append([f"and {len(last) - MOST_CLASSES} more", *[""] * (len(titles) - 1)])
    return titles, rows


def duration(seconds: float | None) -> str:
    """Return seconds as "4 min 05 s"."""
    if seconds is None:
        return "duration not known"
    whole_s = round(seconds)
    hours, minutes = whole_s // 3600, whole_s // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_s % 60:02d} s" if minutes else f"{whole_s} s"


def started(time_ms: int | None) -> str:
    """Return the time of the start in UTC."""
    if time_ms is None:
        return "start not known"
    try:
        return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return "start not known"


def whole(value: int | None) -> str:
    return NOT_WRITTEN if value is None else f"{value:,}".replace(",", " ")


def decimal(value: float | None) -> str:
    return NOT_WRITTEN if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return NOT_WRITTEN if value is None else f"{value:.1%}"


def rate(value: float | None) -> str:
    if value is None:
        return NOT_WRITTEN
    return f"{whole(round(value)) if value >= 100 else f'{value:.3g}'} / s"


def reasons(found: Mapping[str, int]) -> str:
    """Return "stale 4, overflow 2"; empty for nothing."""
    return ", ".join(f"{one_line(reason, 40)} {amount}" for reason, amount in found.items())


def _schedule_remark(numbers: KeyNumbers) -> str:
    if numbers.scheduled_b_ratio is None:
        return "schedule not known"
    due = "" if numbers.num_scheduled_b_steps is None else f", {numbers.num_scheduled_b_steps} due"
    return f"schedule {numbers.scheduled_b_ratio}{due}"


def _last_metric(data: ReportData, name: str) -> str:
    return _metric(data.evaluations[-1].metrics.get(name)) if data.evaluations else NOT_WRITTEN


def _change(data: ReportData, name: str) -> str:
    compared = data.before_and_after
    if not compared:
        return "no evaluation written"
    first = compared[0].metrics.get(name)
    if len(compared) < 2 or first is None:
        return f"evaluation {one_line(compared[-1].label, 24)!r}"
    return f"{one_line(compared[0].label, 24)} {_metric(first)}"


def _metric(value: float | None) -> str:
    if value is None:
        return NOT_WRITTEN
    return f"{value:.0f}" if value == int(value) and abs(value) >= 2 else f"{value:.3f}"
