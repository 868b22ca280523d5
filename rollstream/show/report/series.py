"""Series of numbers for plots: read from rows, thinned, smoothed, and set on a time axis. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rollstream.show.report.counting import number
from rollstream.show.report.data import Row

LARGEST_NUM_POINTS: Final = 400


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def thin(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    largest: int = LARGEST_NUM_POINTS,
    join: Callable[[Sequence[float]], float] = mean,
) -> tuple[list[float], list[float]]:
    """Return at most ``largest`` points, each a run of neighbours joined; short series are unchanged."""
    if len(xs) <= largest:
        return list(xs), list(ys)
    edges = [round(part * len(xs) / largest) for part in range(largest + 1)]
    spans = list(zip(edges, edges[1:], strict=False))
    return [mean(xs[a:b]) for a, b in spans], [join(ys[a:b]) for a, b in spans]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return for each value the mean of the ``window`` (odd) values around it, fewer at the ends."""
    half = window // 2
    around = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [mean(near) for near in around]


def points(rows: Sequence[Row], x_name: str, y_name: str) -> tuple[list[float], list[float]]:
    """Return two fields of the rows that have both as numbers."""
    pairs = [(number(row, x_name), number(row, y_name)) for row in rows]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time axis of a plot: where it starts, and its unit."""

    start_ms: float
    unit_ms: float
    unit: str

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Clock:
        """Return the clock that fits the rows: seconds, minutes from a quarter of an hour on, or hours."""
        times = [value for row in rows if (value := number(row, "time_ms")) is not None] or [0.0]
        start_ms, span_ms = min(times), max(times) - min(times)
        if span_ms < 900_000:
            return cls(start_ms=start_ms, unit_ms=1000.0, unit="seconds")
        if span_ms < 6 * 3_600_000:
            return cls(start_ms=start_ms, unit_ms=60_000.0, unit="minutes")
        return cls(start_ms=start_ms, unit_ms=3_600_000.0, unit="hours")

    def timed(self, rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
        """Return times and values of the rows that have both."""
        xs, ys = points(rows, "time_ms", name)
        return [(x - self.start_ms) / self.unit_ms for x in xs], ys
