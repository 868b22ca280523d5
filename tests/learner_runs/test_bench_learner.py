"""`rollstream bench learner`: both loops train, and every number that is told was measured."""

from __future__ import annotations

import json
import math

import pytest

from broker_schemas.errors import ConfigError
from rollstream.bench import learner as bench


@pytest.mark.req("L-11", "L-13")
def test_it_measures_both_loops_on_the_same_segments() -> None:
    report = bench.run_learner_bench(size="tiny", quick=True)

    assert math.isfinite(report.loss)
    assert report.step_s > 0
    assert report.plain_step_s > 0
    assert report.tokens_per_s == pytest.approx(report.num_tokens / report.step_s)
    assert report.row_bytes > 0
    assert report.predicted_row_bytes == pytest.approx(report.row_bytes, rel=0.1)
    assert report.utilisation is None or 0 < report.utilisation < 1
    assert "times as fast" in report.render()
    assert json.loads(json.dumps(report.to_json()))["speed_up"] == pytest.approx(report.speed_up)


def test_what_does_not_fit_is_said_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_host_bytes", lambda: 1_000_000)
    with pytest.raises(ConfigError, match=r"got 0.0 GB free, expected \d+.\d GB for weights"):
        bench.run_learner_bench(size="2B", quick=True)


@pytest.mark.req("L-13")
def test_adapters_are_trained_in_both_loops() -> None:
    report = bench.run_learner_bench(size="tiny", lora_rank=4, attention="segments", quick=True)

    assert math.isfinite(report.loss)
    assert report.speed_up > 0
