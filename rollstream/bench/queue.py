"""`rollstream bench queue`: the first rows of the budget table, measured on an embedded server of its own.

Owns the report; the measurements are in ``queue_processes``, ``queue_throughput`` and ``queue_growth``.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from rollstream.bench.queue_growth import GrowthRow, LatencyReport, measure_growth, measure_latency
from rollstream.bench.queue_processes import (
    ThroughputRow,
    WholeWayReport,
    measure_throughput,
    measure_whole_way,
)
from rollstream.bench.queue_throughput import (
    BODIES_ALONE,
    MemoryReport,
    TransitionCost,
    bytes_per_token,
    measure_memory,
    measure_transitions,
)
from rollstream.stack.embedded_redis import EmbeddedRedis

MEMORY_BUDGET_BYTES = 5_000_000
BYTES_PER_TOKEN_BUDGET = 10.0
HELD_BUDGET = 1.2
GROWTH_BUDGET = 1.3
WHOLE_WAY_RECORDS_PER_S = 9_000
WHOLE_WAY_CPU_US = 60.0


@dataclass(frozen=True, kw_only=True)
class QueueBenchReport:
    """Everything one run of the benchmark measured; ratios are medians over interleaved repetitions."""

    seed: int
    quick: bool
    throughput: tuple[ThroughputRow, ...]
    whole_way: WholeWayReport
    transitions: tuple[TransitionCost, ...]
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
        rows += [
            (f"{row.what}, times PipelineRL", row.times, row.least_times_stream)
            + (row.times >= row.least_times_stream,)
            for row in self.throughput
        ]
        way, memory = self.whole_way, self.memory
        speed, cpu_us = way.records_per_s, way.broker_cpu_us
        rows += [
            ("whole way, records a second", speed, WHOLE_WAY_RECORDS_PER_S, speed >= WHOLE_WAY_RECORDS_PER_S),
            ("whole way, broker CPU us a record", cpu_us, WHOLE_WAY_CPU_US, cpu_us <= WHOLE_WAY_CPU_US),
            *(self._growth(role) for role in ("producers", "ranks")),
            ("memory over the bodies held", memory.held_ratio, HELD_BUDGET, memory.held_ratio <= HELD_BUDGET),
            ("memory after a drained run, bytes", memory.left_bytes, MEMORY_BUDGET_BYTES)
            + (memory.left_bytes < MEMORY_BUDGET_BYTES,),
        ]
        for name, measured in self.bytes_per_token.items():
            rows.append(
                (f"{name}, bytes per token", measured, BYTES_PER_TOKEN_BUDGET)
                + (measured <= BYTES_PER_TOKEN_BUDGET,)
            )
        return tuple(rows)

    def _growth(self, role: str) -> tuple[str, float, float, bool]:
        """Return how much more of the broker's CPU a record costs with more clients than with one."""
        costs = [row.broker_cpu_us for row in self.growth if row.role == role]
        growth = max(costs) / costs[0]
        return f"broker CPU a record, many {role} to one", growth, GROWTH_BUDGET, growth <= GROWTH_BUDGET

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

    ``quick`` repeats less and takes fewer records. ``seed`` fixes the records.
    Raises ConfigError without a redis-server, BrokerError.
    """
    rng = random.Random(seed)
    with _server() as url:
        return QueueBenchReport(
            seed=seed,
            quick=quick,
            throughput=measure_throughput(url, seed, quick=quick),
            whole_way=measure_whole_way(url, seed, quick=quick),
            transitions=measure_transitions(url, rng, num_records=512 if quick else 4_096),
            memory=measure_memory(url, rng, num_records=1_000 if quick else 10_000),
            bytes_per_token=bytes_per_token(rng),
            latency=measure_latency(url, rng, seconds=2.0 if quick else 10.0),
            growth=measure_growth(url, rng, quick=quick),
        )


@contextmanager
def _server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rollstream-bench-") as folder:
        server = EmbeddedRedis.start(Path(folder), durability="none")
        try:
            yield server.url
        finally:
            server.stop()


def _tables(report: QueueBenchReport) -> list[Table]:
    budgets = _table("budgets of DESIGN.md section 10", "budget", "measured", "limit", "met")
    for what, measured, limit, is_met in report.budgets:
        budgets.add_row(what, f"{measured:,.2f}", f"{limit:,.2f}", "yes" if is_met else "NO")
    speed = _table(
        f"one hop between two processes, records a second (seed {report.seed})",
        *("records", "ours", "bare", "ratio", "lowest", "highest"),
    )
    for row in report.throughput:
        ratios = (row.ratio, min(row.ratios), max(row.ratios))
        rates = (row.records_per_s, row.bare_records_per_s)
        speed.add_row(row.what, *(f"{rate:,.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios))
    others = _table(
        "the same against PipelineRL's stream (nothing acknowledged, nothing freed)",
        *("records", "ours", "theirs", "times", "lowest", "highest"),
    )
    for row in report.throughput:
        times = (row.times, min(row.times_stream), max(row.times_stream))
        rates = (row.records_per_s, row.stream_records_per_s)
        others.add_row(row.what, *(f"{rate:,.0f}" for rate in rates), *(f"{value:.1f}" for value in times))
    cost = _table("broker CPU of a record of 8 KB", "transition", "us a record")
    for part in report.transitions:
        cost.add_row(part.what, f"{part.broker_cpu_us:.1f}")
    in_one = sum(part.broker_cpu_us for part in report.transitions if part.what != BODIES_ALONE)
    cost.add_row("all, in one process", f"{in_one:.1f}")
    cost.add_row("all, over three processes", f"{report.whole_way.broker_cpu_us:.1f}")
    latency = report.latency
    slow = _table(f"push to consumer, {latency.records_per_s:g} a second", "p50 ms", "p99 ms", "max ms")
    slow.add_row(f"{latency.p50_ms:.2f}", f"{latency.p99_ms:.2f}", f"{latency.max_ms:.2f}")
    growth = _table("cost of a record as clients are added", "clients", "wall us", "broker CPU us")
    for item in report.growth:
        name = f"{item.num_clients} {item.role if item.num_clients > 1 else item.role.removesuffix('s')}"
        growth.add_row(name, f"{item.wall_us:.1f}", f"{item.broker_cpu_us:.1f}")
    return [budgets, speed, others, cost, slow, growth]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
