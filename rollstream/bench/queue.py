"""`rollstream bench queue`: the first rows of the budget table, measured on an embedded server of its own.

Owns the report; the measurements are in ``queue_throughput`` and ``queue_growth``.
"""

from __future__ import annotations

import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from rollstream.bench.queue_growth import GrowthRow, LatencyReport, measure_growth, measure_latency
from rollstream.bench.queue_throughput import (
    MemoryReport,
    ThroughputRow,
    bytes_per_token,
    measure_memory,
    measure_throughput,
)
from rollstream.stack.embedded_redis import EmbeddedRedis

MEMORY_BUDGET_BYTES = 5_000_000
BYTES_PER_TOKEN_BUDGET = 10.0


@dataclass(frozen=True, kw_only=True)
class QueueBenchReport:
    """Everything one run of the benchmark measured; ratios are medians over interleaved repetitions."""

    seed: int
    quick: bool
    throughput: tuple[ThroughputRow, ...]
    memory: MemoryReport
    bytes_per_token: dict[str, float]
    latency: LatencyReport
    growth: tuple[GrowthRow, ...]

    @property
    def budgets(self) -> tuple[tuple[str, float, float, bool], ...]:
        """Rows of (what, measured, limit, met)."""
        rows = [
            (f"{row.what}, of bare", row.ratio, row.least_ratio, row.ratio >= row.least_ratio)
            for row in self.throughput
        ]
        left = self.memory.left_bytes
        rows.append(
            ("memory after a drained run, bytes", left, MEMORY_BUDGET_BYTES, left < MEMORY_BUDGET_BYTES)
        )
        for name, measured in self.bytes_per_token.items():
            rows.append(
                (f"wire size of a {name}, bytes per token", measured, BYTES_PER_TOKEN_BUDGET)
                + (measured <= BYTES_PER_TOKEN_BUDGET,)
            )
        return tuple(rows)

    @property
    def is_within_budget(self) -> bool:
        """Whether every budget is met."""
        return all(is_met for *_, is_met in self.budgets)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {**asdict(self), "is_within_budget": self.is_within_budget}

    def render(self) -> Group:
        """Return tables for a rich console: budgets, throughput, latency and growth."""
        return Group(*_tables(self))


def run_queue_bench(seed: int = 0, quick: bool = False) -> QueueBenchReport:
    """Measure the queue on a server of its own, without durability as the baseline has none.

    ``quick`` repeats less and takes fewer records. ``seed`` fixes the records. Raises ConfigError without a
    redis-server, BrokerError.
    """
    rng = random.Random(seed)
    with _server() as url:
        return QueueBenchReport(
            seed=seed,
            quick=quick,
            throughput=measure_throughput(url, rng, quick=quick),
            memory=measure_memory(url, rng, num_records=1_000 if quick else 10_000),
            bytes_per_token=bytes_per_token(rng),
            latency=measure_latency(url, rng, seconds=2.0 if quick else 10.0),
            growth=measure_growth(url, rng, quick=quick),
        )


@contextmanager
def _server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rollstream-bench-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        server = EmbeddedRedis.start(Path(folder), durability="none", port=port)
        try:
            yield server.url
        finally:
            server.stop()


def _tables(report: QueueBenchReport) -> list[Table]:
    budgets = _table("budgets of DESIGN.md section 10", "budget", "measured", "limit", "met")
    for what, measured, limit, is_met in report.budgets:
        budgets.add_row(what, f"{measured:,.2f}", f"{limit:,.2f}", "yes" if is_met else "NO")
    speed = _table(
        f"records a second (seed {report.seed})", "records", "ours", "bare", "ratio, lowest to highest"
    )
    for row in report.throughput:
        spread = f"{row.ratio:.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        speed.add_row(row.what, f"{row.records_per_s:,.0f}", f"{row.bare_records_per_s:,.0f}", spread)
    memory = report.memory
    whole = f"{memory.records_per_s:,.0f}"
    speed.add_row(f"the whole way of {memory.num_records:,} rollouts, to settled", whole, "", "")
    latency = report.latency
    slow = _table(
        f"push to consumer at {latency.records_per_s:g} records a second", "p50 ms", "p99 ms", "max ms"
    )
    slow.add_row(f"{latency.p50_ms:.2f}", f"{latency.p99_ms:.2f}", f"{latency.max_ms:.2f}")
    growth = _table("cost of a record as clients are added", "clients", "wall us", "broker CPU us")
    for item in report.growth:
        name = f"{item.num_clients} {item.role}"
        growth.add_row(name, f"{item.wall_us:.1f}", f"{item.broker_cpu_us:.1f}")
    return [budgets, speed, slow, growth]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
