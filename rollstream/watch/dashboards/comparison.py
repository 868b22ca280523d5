"""Comparison: two runs in the same panels, the other one as it was some time before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rollstream.watch.dashboards.panels import Choice, Dashboard, Panel, Query, Row
from rollstream.watch.dashboards.queries import ROLLOUTS_A_SECOND, STEPS_A_SECOND, TOKENS_A_SECOND

_F1: Final = 'metric="eval_rollout_f1"'
_TOTAL_OF_B: Final = ('kind="B"', 'term="total"')


@dataclass(frozen=True)
class _Side:
    """One of the two runs; ``offset``: how its series are moved to the other's time."""

    matcher: str
    offset: str

    def series(self, name: str, *matchers: str) -> str:
        return f"{name}{{{', '.join((self.matcher, *matchers))}}}{self.offset}"

    def rate(self, name: str, *matchers: str) -> str:
        return f"rate({name}{{{', '.join((self.matcher, *matchers))}}}[$__rate_interval]{self.offset})"


_RUN: Final = _Side('run="$run"', "")
_OTHER: Final = _Side('run="$other"', " offset $shift")


def _compared(title: str, meaning: str, unit: str, ask: Callable[[_Side], str]) -> Panel:
    queries = (Query(ask(_RUN), "$run"), Query(ask(_OTHER), "$other, $shift before"))
    return Panel(title=title, meaning=meaning, unit=unit, width=12, queries=queries)


def _f1(side: _Side) -> str:
    found = (side.series(name, _F1) for name in ("rollstream_evaluation", "rollstream_round_evaluation"))
    return f"max({' or '.join(found)})"


def _idle(side: _Side) -> str:
    waits, busy = (side.rate(f"rollstream_learner_{what}_seconds_total") for what in ("wait", "busy"))
    return f"max({waits}) / (max({waits} + {busy}) > 0)"


def _lag(side: _Side) -> str:
    top, bottom = (side.rate(f"rollstream_learner_claim_lag_versions_{part}") for part in ("sum", "count"))
    return f"max({top}) / (max({bottom}) > 0)"


_QUALITY = Row(
    "How good",
    (
        _compared("F1", "Of the last evaluation.", "percentunit", _f1),
        _compared(
            "Loss of B steps",
            "Total of the last one.",
            "none",
            lambda side: f"max({side.series('rollstream_learner_loss', *_TOTAL_OF_B)})",
        ),
        _compared(
            "Committed steps",
            "Optimizer steps; where the lines are level, the runs are equally far.",
            "short",
            lambda side: f"max({side.series('rollstream_committed_steps_total')})",
        ),
        _compared("Lag of trained segments", "Mean policy versions behind.", "short", _lag),
    ),
)

_SPEED = Row(
    "How fast, and what is lost",
    (
        _compared(
            "Steps",
            "Optimizer steps a second.",
            STEPS_A_SECOND,
            lambda side: f"max({side.rate('rollstream_committed_steps_total')})",
        ),
        _compared(
            "Tokens trained",
            "A second, all kinds of steps.",
            TOKENS_A_SECOND,
            lambda side: f"sum(max by (kind) ({side.rate('rollstream_learner_tokens_total')}))",
        ),
        _compared("Learner waiting", "Share of its time.", "percentunit", _idle),
        _compared(
            "Dropped",
            "Rollouts a second, all reasons.",
            ROLLOUTS_A_SECOND,
            lambda side: f"sum({side.rate('rollstream_dropped_rollouts_total')})",
        ),
    ),
)

COMPARISON: Final = Dashboard(
    uid="rollstream-comparison",
    title="rollstream: comparison",
    meaning="Two runs in the same panels; a run of another day is moved by how long before it began.",
    rows=(_QUALITY, _SPEED),
    choices=(Choice("other", "With", "rollstream_broker_up", "run"),),
    shifts=("1ms", "30m", "1h", "3h", "6h", "12h", "1d", "2d", "7d"),
)
