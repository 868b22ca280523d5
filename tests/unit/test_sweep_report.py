"""A sweep's numbers, its table at 80 columns, and its page."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from rollstream.sweep.figures import MEASURES, lines_of, sweep_plots
from rollstream.sweep.grid import parse_grid
from rollstream.sweep.numbers import CellNumbers, cell_numbers
from rollstream.sweep.report import COLUMNS, Sweep, numbers_row, render_sweep, render_sweep_page
from tests.builders.run_folders import START_MS, make_sample, make_step

GRID = parse_grid(
    "blocks:\n"
    "- {title: share of rollout steps, product: {stage2_ab.schedule.b_ratio: [0.05, 0.4]}}\n"
    "- title: publishing by age\n"
    "  product: {stage2_async.sync_every_steps: [1, 2], stage2_async.version_window: [1, 2, 4]}\n"
    "- {title: pairs, cells: [{a.x: 1, a.y: 2}]}\n",
    "grid.yaml",
)
NAMES = [cell.name for cell in GRID.cells]


def make_numbers(**changes: Any) -> CellNumbers:
    values: dict[str, Any] = {
        "num_steps": 24,
        "num_b_steps": 6,
        "num_skipped": 3,
        "idle_share": 0.125,
        "mean_depths": (3.5, 2.5),
        "lag_mean": 0.75,
        "lag_max": 2,
        "drops": {"stale_on_claim": 14, "drop_oldest": 2},
        "rejects": {"malformed": 1},
        "rollouts_per_s": 5.25,
        "tokens_per_s": 2345.6,
        "steps_per_s": 0.875,
        "f1": 0.6875,
        "balanced": True,
    }
    return CellNumbers(**values | changes)


def make_sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "name": "sweep-demo",
        "steps": 24,
        "grid": GRID,
        "numbers": {name: make_numbers(num_skipped=at) for at, name in enumerate(NAMES)},
        "start_f1": 0.612,
    }
    return Sweep(**values | changes)


def shown(sweep: Sweep, width: int = 80) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(render_sweep(sweep))
    return stream.getvalue()


@pytest.mark.req("O-7")
def test_the_numbers_of_a_cell_are_those_of_the_time_of_training() -> None:
    """Given 2 steps from second 10 to 20, samples before and after them count neither for depth nor rate."""
    steps = [
        make_step(0, kind="A", reason="queue_short", wait_s=1.0, busy_s=4.0, step_s=5.0, num_tokens=500)
        | {"time_ms": START_MS + 15_000},
        make_step(1, wait_s=0.5, busy_s=4.5, step_s=5.0, num_tokens=1500, num_segments=8)
        | {"time_ms": START_MS + 20_000, "lag_claimed_mean": 0.5, "lag_claimed_max": 1},
    ]
    samples = [
        make_sample(5, ready_depth=[0, 0], pushed=0),
        make_sample(12, ready_depth=[2, 4], pushed=10),
        make_sample(16, ready_depth=[4, 5], pushed=40),
        make_sample(30, ready_depth=[8, 8], pushed=400),
    ]

    found = cell_numbers(steps, samples, {"dropped": {"overflow": 3}, "balanced": True}, f1=0.5)

    assert found.mean_depths == (3.0, 4.5)
    assert found.mean_depth == 3.75
    assert found.rollouts_per_s == pytest.approx(30 / 4)
    assert found.tokens_per_s == pytest.approx(200)
    assert found.steps_per_s == pytest.approx(0.2)
    assert found.idle_share == pytest.approx(0.15)
    assert (found.num_steps, found.num_b_steps, found.num_skipped) == (2, 1, 1)
    assert found.realised_b_ratio == 0.5
    assert (found.lag_mean, found.lag_max) == (0.5, 1)
    assert found.drops == {"overflow": 3}
    assert found.f1 == 0.5
    assert found.balanced is True


def test_the_mean_lag_weighs_every_segment_alike() -> None:
    steps = [
        make_step(0, lag_claimed_mean=0.0, lag_claimed_max=0, num_segments=30),
        make_step(1, lag_claimed_mean=2.0, lag_claimed_max=3, num_segments=10),
        make_step(2, kind="A", reason="schedule", lag_claimed_mean=9.0, lag_claimed_max=9),
    ]

    found = cell_numbers(steps, [], {}, f1=None)

    assert found.lag_mean == pytest.approx(0.5)
    assert found.lag_max == 3


def test_the_spread_is_the_standard_error_over_the_fifths_of_the_run() -> None:
    # lags of 0, 1, 2, 3, 4 in the fifths: mean 2, standard deviation 1.5811
    steps = [make_step(at, lag_claimed_mean=float(at // 2), num_segments=4) for at in range(10)]

    found = cell_numbers(steps, [], {}, f1=None)

    assert found.lag_mean == pytest.approx(2.0)
    assert found.spreads["lag_mean"] == pytest.approx(1.5811 / 5**0.5, rel=1e-4)
    assert "mean_depth" not in found.spreads, "nothing was sampled"
    assert not cell_numbers(steps[:9], [], {}, f1=None).spreads, "too short to tell"


def test_a_run_that_wrote_nothing_gives_dashes_and_no_zeros() -> None:
    found = cell_numbers([], [], {}, f1=None)

    assert found == CellNumbers()
    assert numbers_row(found).count("–") == 8
    assert numbers_row(None) == ["–"] * len(COLUMNS)


def test_a_summary_is_read_back_as_it_was_written() -> None:
    for numbers in (
        make_numbers(),
        CellNumbers(),
        make_numbers(mean_depths=(), lag_max=None, balanced=False, spreads={"lag_mean": 0.25}),
    ):
        assert CellNumbers.from_json(json.loads(json.dumps(numbers.to_json()))) == numbers


@pytest.mark.req("O-7")
def test_the_table_is_readable_at_80_columns() -> None:
    text = shown(make_sweep())

    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("0.4 "))
    assert row.split() == ["0.4", "12%", "3.0", "1", "0.8/2", "16", "5.2", "2346", "0.88", "0.25", "0.69"]
    assert "9 of 9 cells, 24 steps each, start model F1 0.612" in text
    assert "b-ratio-0-05: dropped stale_on_claim 14, drop_oldest 2; rejected malformed 1" in text
    for title, _ in COLUMNS:
        assert title in text


def test_large_numbers_still_fit() -> None:
    large = make_numbers(
        num_skipped=1234,
        tokens_per_s=123_456.0,
        rollouts_per_s=1234.5,
        drops={"overflow": 54_321},
        lag_mean=12.5,
    )

    text = shown(make_sweep(numbers=dict.fromkeys(NAMES, large)))

    assert max(len(line) for line in text.splitlines()) <= 80
    assert "123456" in text
    assert "54321" in text


def test_cells_without_numbers_say_why() -> None:
    sweep = make_sweep(numbers={NAMES[0]: make_numbers()}, failures={NAMES[1]: "learner stopped: stall"})

    text = shown(sweep)

    assert "1 of 9 cells" in text
    assert f"{NAMES[1]}: failed: learner stopped: stall" in text
    assert f"{NAMES[2]}: not run yet" in text


def test_an_audit_that_does_not_balance_is_told() -> None:
    assert "its audit does NOT balance" in shown(make_sweep(numbers={NAMES[0]: make_numbers(balanced=False)}))


class PageText(HTMLParser):
    """Collects ids, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.req("O-7")
def test_the_page_needs_nothing_else_and_plots_every_measure_of_every_block() -> None:
    page = render_sweep_page(make_sweep())
    read = PageText(page)

    assert read.tags.count("svg") == len(MEASURES) * len(GRID.blocks)
    assert len(read.ids) == len(set(read.ids))
    assert all(address.startswith("#") for address in read.addresses)
    assert not re.search(r"<script|@import|https?://(?!www\.w3\.org)", page)
    assert "--series-1" in page
    text = " ".join(read.text)
    for measure in MEASURES:
        assert measure.title in text
    for words in ("stage2_ab.schedule.b_ratio", "stale_on_claim 14", "3.5, 2.5", "start model", "asked for"):
        assert words in text


def test_a_page_of_a_sweep_that_has_just_begun_says_so_and_escapes_what_it_is_told() -> None:
    page = render_sweep_page(make_sweep(numbers={}, failures={NAMES[0]: "<b>no & data</b>"}, start_f1=None))

    assert "no cell with this number yet" in page
    assert "&lt;b&gt;no &amp; data&lt;/b&gt;" in page
    assert "<b>" not in page


def test_a_product_of_two_keys_draws_a_line_for_each_value_of_the_second() -> None:
    block = GRID.blocks[1]
    numbers = {cell.name: make_numbers(f1=at / 10) for at, cell in enumerate(block.cells)}
    del numbers[block.cells[0].name]

    ticks, lines = lines_of(block, numbers, lambda item: item.f1)

    assert ticks == ["1", "2"]
    assert [(line.name, line.places, line.values) for line in lines] == [
        ("version_window 1", (1,), (0.3,)),
        ("version_window 2", (0, 1), (0.1, 0.4)),
        ("version_window 4", (0, 1), (0.2, 0.5)),
    ]


def test_every_axis_begins_at_zero_so_that_noise_looks_no_larger_than_it_is() -> None:
    block = GRID.blocks[0]
    numbers = {
        cell.name: make_numbers(f1=0.80 + at / 1000, idle_share=0.80 + at / 1000)
        for at, cell in enumerate(block.cells)
    }

    plots = sweep_plots(block, numbers, start_f1=0.8, prefix="b0")

    cut = [plot.title for plot in plots if plot.svg and not re.search(r">0(\.0+)?</text>", plot.svg)]
    assert not cut


def test_bars_show_how_far_a_number_is_known_and_none_where_it_is_not() -> None:
    block = GRID.blocks[1]
    names = [cell.name for cell in block.cells]
    numbers = {name: make_numbers(spreads={"lag_mean": 0.25}) for name in names[:3]} | {
        name: make_numbers() for name in names[3:]
    }

    plots = {plot.title: plot.svg for plot in sweep_plots(block, numbers, start_f1=None, prefix="b1")}

    assert "spread-" in (plots["Lag when claimed, mean"] or "")
    assert [title for title, svg in plots.items() if "spread-" in (svg or "")] == ["Lag when claimed, mean"]


def test_a_block_of_listed_cells_is_drawn_over_its_cells() -> None:
    block = GRID.blocks[2]
    numbers = {cell.name: make_numbers() for cell in block.cells}

    ticks, lines = lines_of(block, numbers, lambda item: item.idle_share)

    assert ticks == ["1 / 2"]
    assert [(line.name, line.values) for line in lines] == [("", (0.125,))]
    assert all(plot.svg for plot in sweep_plots(block, numbers, start_f1=None, prefix="b2"))
