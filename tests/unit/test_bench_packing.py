"""The packing benchmark: its own methods and the report."""

from __future__ import annotations

import json
import random

import pytest

from rollstream.bench.packing import (
    CAPACITIES_TOKENS,
    DISTRIBUTIONS,
    METHODS,
    _first_fit_decreasing,
    _lock_step_fill,
    _next_fit,
    run_packing_bench,
    sample_lengths,
)


def test_every_method_is_measured_on_every_stream_and_capacity() -> None:
    report = run_packing_bench(quick=True)

    keys = {(row.distribution, row.capacity_tokens, row.method) for row in report.rows}
    assert len(keys) == len(report.rows) == len(DISTRIBUTIONS) * len(CAPACITIES_TOKENS) * len(METHODS)
    assert all(0.5 < row.fill <= 1.0 and 0.5 < row.lock_step_fill <= 1.0 for row in report.rows)
    shares = [row for row in report.budgets if row.unit == "share"]
    assert len(shares) == 3
    assert all(row.is_met for row in shares)
    document = json.loads(json.dumps(report.to_json()))
    assert document["rows"][0]["method"] == "exact"
    assert len(report.render().renderables) == 2


def test_first_fit_decreasing_equals_the_plain_definition() -> None:
    generator = random.Random(0)
    for _ in range(50):
        lengths = [generator.randint(1, 40) for _ in range(generator.randint(1, 60))]
        plain: list[int] = []
        for length in sorted(lengths, reverse=True):
            place = next((i for i, load in enumerate(plain) if load + length <= 40), len(plain))
            plain[place : place + 1] = [(plain[place] if place < len(plain) else 0) + length]

        assert _first_fit_decreasing(lengths, 40) == plain


def test_next_fit_and_lock_step_fill_by_hand() -> None:
    assert _next_fit([6, 5, 4, 1], 10) == [6, 10]
    assert _lock_step_fill([4] * 8 + [2] * 4) == (8 * 4 + 4 * 2) / (8 * 4 + 8 * 2)


def test_length_streams_have_the_promised_shape_and_an_unknown_one_is_refused() -> None:
    lognormal, uniform, short = (sample_lengths(name, 4000, 0) for name in ("lognormal", "uniform", "short"))

    assert sum(lognormal) / 4000 == pytest.approx(2500, rel=0.05)
    assert (min(uniform) >= 2000, max(uniform) <= 6000) == (True, True)
    assert sum(short) / 4000 == pytest.approx(350, rel=0.02)
    with pytest.raises(ValueError, match="got 'zipf', expected one of lognormal, uniform, short, bimodal"):
        sample_lengths("zipf", 1, 0)
