"""The queue's benchmark on its own server: what it reports is whole; no time is asserted."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rollstream.bench.queue import run_queue_bench


@pytest.mark.req("Q-3", "Q-12")
def test_a_quick_run_reports_every_budget_and_keeps_those_that_no_clock_decides() -> None:
    report = run_queue_bench(quick=True)

    budgets = {what: is_met for what, _, _, is_met in report.budgets}
    assert [row.least_ratio for row in report.throughput] == [0.8, 0.95]
    assert all(is_met for what, is_met in budgets.items() if "bytes" in what)
    assert len(budgets) == 13
    assert report.memory.held_ratio < 1.5
    assert all(part.broker_cpu_us > 0 for part in report.transitions if part.what in ("push", "fetch"))
    assert report.whole_way.num_records == 256
    assert [(row.role, row.num_clients) for row in report.growth] == [
        ("producers", 1),
        ("producers", 8),
        ("ranks", 1),
        ("ranks", 4),
    ]
    assert report.latency.num_records == 100
    assert json.loads(json.dumps(report.to_json()))["is_within_budget"] == report.is_within_budget
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    assert "memory after a drained run, bytes" in text
    assert "\u2026" not in text, "a table is too wide for 80 columns"
