"""Grid files: which cells they hold, how a cell's run is named, and what is refused."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.errors import ConfigError
from configs import load_config
from rollstream.sweep.grid import Cell, Grid, parse_grid, run_name, slug, yaml_text
from rollstream.sweep.running import SHIPPED_GRID
from tests.builders.configs import PROJECT_ROOT

B_RATIO = "stage2_ab.schedule.b_ratio"
SYNC, WINDOW = "stage2_async.sync_every_steps", "stage2_async.version_window"


def grid_of(text: str) -> Grid:
    return parse_grid(text, "grid.yaml")


def make_cell(*values: tuple[str, str | int | float | bool]) -> Cell:
    return Cell(values=values or ((B_RATIO, 0.05),))


@pytest.mark.req("O-7")
def test_the_shipped_grid_is_the_one_of_the_requirement() -> None:
    grid = parse_grid(SHIPPED_GRID.read_text("utf-8"), "sweep_grid.yaml")

    ratios, crossed = grid.blocks
    assert [cell.values for cell in ratios.cells] == [((B_RATIO, r),) for r in (0.05, 0.1, 0.2, 0.3, 0.4)]
    assert [cell.values for cell in crossed.cells] == [
        ((SYNC, sync), (WINDOW, window)) for sync, window in itertools.product((1, 2, 4), (1, 2, 4))
    ]
    assert len(grid.cells) == 14


@pytest.mark.req("O-7")
def test_every_cell_of_the_shipped_grid_is_a_configuration_of_the_demo() -> None:
    grid = parse_grid(SHIPPED_GRID.read_text("utf-8"), "sweep_grid.yaml")

    for cell in grid.cells:
        config = load_config(PROJECT_ROOT / "configs" / "demo.yaml", cell.overrides)
        found = {
            B_RATIO: float(config.b_ratio),
            SYNC: config.stage2_async.sync_every_steps,
            WINDOW: config.stage2_async.version_window,
        }
        assert {key: found[key] for key, _ in cell.values} == dict(cell.values)


def test_cells_may_be_listed_one_by_one_and_a_block_may_set_more() -> None:
    grid = grid_of(
        "blocks:\n- title: pairs\n  set: {a.on: true, a.x: 9}\n"
        "  cells: [{a.x: 1, a.y: low}, {a.x: 2, a.y: '0.5'}]\n"
    )

    (block,) = grid.blocks
    assert not block.is_product
    assert block.axis == "x / y"
    assert [cell.overrides for cell in block.cells] == [
        ("a.on=true", "a.x=9", "a.x=1", "a.y=low"),
        ("a.on=true", "a.x=9", "a.x=2", "a.y='0.5'"),
    ]
    assert block.cells[0].label == "1 / low"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,6}\.[a-z]{1,6}", fullmatch=True),
        st.lists(st.integers(-99, 99), min_size=1, max_size=4, unique=True),
        min_size=1,
        max_size=3,
    )
)
def test_a_product_holds_every_combination_once(axes: dict[str, list[int]]) -> None:
    text = "blocks:\n- product: {" + ", ".join(f"{key}: {values}" for key, values in axes.items()) + "}\n"

    (block,) = grid_of(text).blocks

    expected = {tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())}
    assert {cell.values for cell in block.cells} == expected
    assert len(block.cells) == len(expected) == len({cell.name for cell in block.cells})


@given(st.one_of(st.integers(), st.booleans(), st.text(max_size=12), st.floats(allow_nan=False, width=32)))
def test_a_value_survives_the_way_through_an_override(value: str | int | float | bool) -> None:
    read = yaml.safe_load(yaml_text(value))

    assert (float(read) if isinstance(value, float) else read) == value


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "no list under 'blocks'"),
        ("blocks: []", "no list under 'blocks'"),
        ("blocks: [", "not readable as YAML"),
        ("blocks: [7]", "blocks[0]: got int"),
        ("blocks: [{title: a}]", "both or neither of product and cells"),
        ("blocks: [{product: {a.b: [1]}, cells: [{a.b: 1}]}]", "both or neither"),
        ("blocks: [{product: {a.b: [1]}, when: 3}]", "got when"),
        ("blocks: [{product: {a.b: 1}}]", "blocks[0].product.a.b: got 1"),
        ("blocks: [{product: {a.b: []}}]", "at least one value"),
        ("blocks: [{product: {a.b: [[1]]}}]", "expected a number, a text"),
        ("blocks: [{product: {a.b: [null]}}]", "expected a number, a text"),
        ("blocks: [{product: {}}]", "expected a map of key to list"),
        ("blocks: [{product: {'a=b': [1]}}]", "got the key 'a=b'"),
        ("blocks: [{product: {a..b: [1]}}]", "got the key 'a..b'"),
        ("blocks: [{cells: []}]", "at least one map"),
        ("blocks: [{cells: [{a.b: 1}, {a.c: 1}]}]", "expected those of the first cell"),
        ("blocks: [{product: {a.b: [1, 1]}}]", "more than once"),
        ("blocks: [{product: {a.b: [1]}}, {product: {c.b: [1]}}]", "b-1 more than once"),
        (f"blocks: [{{product: {{a.b: {list(range(1001))}}}}}]", "at most 1000"),
    ],
)
def test_what_is_no_grid_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grid_of(text)

    assert str(caught.value).startswith("grid.yaml")
    assert said in str(caught.value)


def test_runs_are_named_after_their_settings() -> None:
    assert run_name("sweep-demo", make_cell()) == "sweep-demo-b-ratio-0-05"
    assert make_cell((SYNC, 1), (WINDOW, 2)).name == "sync-every-steps-1-version-window-2"
    assert make_cell(("a.b", -1)).name != make_cell(("a.b", 1)).name


def test_long_run_names_are_cut_and_stay_apart() -> None:
    cells = [make_cell((f"a.{'key_' * 20}{n}", 1)) for n in range(3)]

    names = {run_name("sweep", cell) for cell in cells}

    assert len(names) == 3
    assert all(len(name) <= 64 and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)


@given(st.text(max_size=40))
def test_slugs_are_words_of_a_run_name(text: str) -> None:
    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", slug(text))
