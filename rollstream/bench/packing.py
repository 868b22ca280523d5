"""Measures how well and how fast each packing method fills packs: `rollstream bench packing`.

Owns the measurement; it calls the packing cores as the packer does and needs no broker.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table

from consumers.packing import SELECTION_METHODS, SelectionMethod, select_pack
from consumers.step_scope import pack_step

Method = Literal["exact", "binpacking", "fifo", "next-fit", "first-fit-decreasing"]
METHODS: tuple[Method, ...] = (*SELECTION_METHODS, "next-fit", "first-fit-decreasing")
CAPACITIES_TOKENS = (8192, 12000, 16384)
DISTRIBUTIONS = ("lognormal", "uniform", "short", "bimodal")
LOCK_STEP_RANKS = 8
BUFFER_SEGMENTS = 512
LONGEST_TOKENS = 8192
"""Every stream fits the smallest capacity, so that all capacities pack the same segments."""

SELECT_BUDGET_MS = 2.0
STEP_BUDGET_MS = 50.0
STEP_FILL_BUDGETS = {"lognormal": 0.98, "uniform": 0.95}


@dataclass(frozen=True, kw_only=True)
class PackingRow:
    """One method on one stream of segments at one capacity."""

    distribution: str
    capacity_tokens: int
    method: Method
    num_packs: int
    fill: float
    """Tokens over capacity, all packs, the last ones of the stream included."""
    lock_step_fill: float
    """Mean over the longest: the busy share of 8 ranks that wait for the longest pack of each micro-step."""
    time_per_pack_ms: float


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One budget of DESIGN.md section 10 and what was measured."""

    name: str
    measured: float
    limit: float
    unit: str
    is_met: bool


@dataclass(frozen=True, kw_only=True)
class PackingBenchReport:
    """Everything one run of the benchmark measured."""

    seed: int
    num_segments: int
    rows: tuple[PackingRow, ...]
    budgets: tuple[BudgetRow, ...]

    @property
    def is_within_budget(self) -> bool:
        """Whether every budget is met."""
        return all(row.is_met for row in self.budgets)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {**asdict(self), "is_within_budget": self.is_within_budget}

    def render(self) -> Group:
        """Return two tables for a rich console: the methods, and the budgets."""
        return Group(_methods_table(self), _budgets_table(self))


def run_packing_bench(seed: int = 0, quick: bool = False) -> PackingBenchReport:
    """Pack the same random segments with every method and measure the budgets; `quick` takes fewer segments.

    Streaming methods see a buffer of 512 segments, refilled after every pack; first-fit-decreasing sees the
    whole stream at once, next-fit one open pack. Everything but the times is determined by the seed.
    """
    num_segments = 512 if quick else 2048
    rows = []
    for distribution in DISTRIBUTIONS:
        lengths = sample_lengths(distribution, num_segments, seed)
        for capacity in CAPACITIES_TOKENS:
            rows += [_measure(distribution, lengths, capacity, method) for method in METHODS]
    budgets = (*_select_budgets(seed), *_step_budgets(seed))
    return PackingBenchReport(seed=seed, num_segments=num_segments, rows=tuple(rows), budgets=budgets)


def sample_lengths(distribution: str, num_segments: int, seed: int) -> list[int]:
    """Return encoded lengths in tokens: lognormal of mean 2,500,
    uniform 2,000 to 6,000, short (350) or bimodal."""
    generator = random.Random(f"{seed}:{distribution}")
    sigma = 0.6
    samplers: dict[str, Callable[[], float]] = {
        "lognormal": lambda: generator.lognormvariate(math.log(2500) - sigma**2 / 2, sigma),
        "uniform": lambda: generator.randint(2000, 6000),
        "short": lambda: generator.gauss(350, 80),
        "bimodal": lambda: (
            generator.gauss(800, 150) if generator.random() < 0.5 else generator.gauss(5500, 500)
        ),
    }
    if distribution not in samplers:
        raise ValueError(f"length distribution: got {distribution!r}, expected one of {', '.join(samplers)}")
    return [max(64, min(LONGEST_TOKENS, round(samplers[distribution]()))) for _ in range(num_segments)]


def _measure(distribution: str, lengths: list[int], capacity: int, method: Method) -> PackingRow:
    started = time.perf_counter()
    if method == "next-fit":
        loads = _next_fit(lengths, capacity)
    elif method == "first-fit-decreasing":
        loads = _first_fit_decreasing(lengths, capacity)
    else:
        loads = _streamed(lengths, capacity, method)
    elapsed_ms = (time.perf_counter() - started) * 1000
    return PackingRow(
        distribution=distribution,
        capacity_tokens=capacity,
        method=method,
        num_packs=len(loads),
        fill=sum(loads) / (capacity * len(loads)),
        lock_step_fill=_lock_step_fill(loads),
        time_per_pack_ms=elapsed_ms / len(loads),
    )


def _streamed(lengths: list[int], capacity: int, method: SelectionMethod) -> list[int]:
    waiting = lengths[:BUFFER_SEGMENTS]
    num_read = len(waiting)
    loads = []
    while waiting:
        chosen = set(select_pack(waiting, capacity, method))
        loads.append(sum(waiting[i] for i in chosen))
        waiting = [length for i, length in enumerate(waiting) if i not in chosen]
        arriving = lengths[num_read : num_read + BUFFER_SEGMENTS - len(waiting)]
        num_read += len(arriving)
        waiting += arriving
    return loads


def _next_fit(lengths: list[int], capacity: int) -> list[int]:
    loads = [0]
    for length in lengths:
        if loads[-1] + length > capacity:
            loads.append(0)
        loads[-1] += length
    return loads


def _first_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """First fit in O(n log n): a tree of maxima finds the first pack with room enough."""
    size = 1 << max(1, len(lengths) - 1).bit_length()
    most_room = [capacity] * (2 * size)
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < size:
            node = 2 * node if most_room[2 * node] >= length else 2 * node + 1
        most_room[node] -= length
        while node > 1:
            node //= 2
            most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
    return [capacity - room for room in most_room[size:] if room < capacity]


def _lock_step_fill(loads: list[int]) -> float:
    micro_steps = [loads[i : i + LOCK_STEP_RANKS] for i in range(0, len(loads), LOCK_STEP_RANKS)]
    return sum(loads) / (LOCK_STEP_RANKS * sum(max(micro_step) for micro_step in micro_steps))


def _select_budgets(seed: int) -> list[BudgetRow]:
    times_ms, num_optimal, num_selections = [], 0, 24
    for repetition in range(num_selections):
        distribution = DISTRIBUTIONS[repetition % len(DISTRIBUTIONS)]
        lengths = sample_lengths(distribution, BUFFER_SEGMENTS, seed + repetition)
        started = time.perf_counter()
        chosen = select_pack(lengths, 16384)
        times_ms.append((time.perf_counter() - started) * 1000)
        num_optimal += sum(lengths[i] for i in chosen) == _largest_total(lengths, 16384)
    name = f"select_pack, {BUFFER_SEGMENTS} segments, 16384 tokens"
    return [
        _budget(f"{name}: median time", statistics.median(times_ms), SELECT_BUDGET_MS, "ms"),
        _budget(f"{name}: optimal", num_optimal / num_selections, 1.0, "share", is_least=True),
    ]


def _largest_total(lengths: list[int], capacity: int) -> int:
    """The optimum by a sorted table of sums, another way than the one it checks."""
    sums = {lengths[0]}
    for length in lengths[1:]:
        sums |= {total + length for total in sums if total + length <= capacity}
        if capacity in sums:
            return capacity
    return max(sums)


def _step_budgets(seed: int) -> list[BudgetRow]:
    rows = []
    for distribution, least_fill in STEP_FILL_BUDGETS.items():
        lengths = sample_lengths(distribution, 1024, seed)
        times_ms, fills = [], []
        for capacity in CAPACITIES_TOKENS:
            started = time.perf_counter()
            ranks = pack_step(lengths, capacity, LOCK_STEP_RANKS)
            times_ms.append((time.perf_counter() - started) * 1000)
            fills.append(sum(lengths) / (capacity * sum(len(packs) for packs in ranks)))
        name = f"1024 segments ({distribution}) into packs for {LOCK_STEP_RANKS} ranks"
        rows.append(_budget(f"{name}: time", max(times_ms), STEP_BUDGET_MS, "ms"))
        rows.append(_budget(f"{name}: fill", min(fills), least_fill, "share", is_least=True))
    return rows


def _budget(name: str, measured: float, limit: float, unit: str, *, is_least: bool = False) -> BudgetRow:
    is_met = measured >= limit if is_least else measured <= limit
    return BudgetRow(name=name, measured=measured, limit=limit, unit=unit, is_met=is_met)


def _methods_table(report: PackingBenchReport) -> Table:
    table = Table(title=f"packing {report.num_segments} segments (seed {report.seed})")
    for heading in ("lengths", "capacity", "method"):
        table.add_column(heading)
    for heading in ("packs", "fill", f"lock-step fill, {LOCK_STEP_RANKS} ranks", "ms per pack"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(
            row.distribution,
            str(row.capacity_tokens),
            row.method,
            str(row.num_packs),
            f"{row.fill:.1%}",
            f"{row.lock_step_fill:.1%}",
            f"{row.time_per_pack_ms:.3f}",
            end_section=row.method == METHODS[-1],
        )
    return table


def _budgets_table(report: PackingBenchReport) -> Table:
    table = Table(title="budgets of DESIGN.md section 10")
    for heading in ("budget", "measured", "limit", "met"):
        table.add_column(heading, justify="left" if heading in ("budget", "met") else "right")
    for row in report.budgets:
        form = "{:.2f} ms" if row.unit == "ms" else "{:.1%}"
        table.add_row(
            row.name, form.format(row.measured), form.format(row.limit), "yes" if row.is_met else "NO"
        )
    return table
