"""What a configuration may say about evaluation: numbers to watch, and settings that need others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.configs import load_mapping, make_mapping, put, refusal


@pytest.mark.req("U-5")
@pytest.mark.parametrize(
    ("metric", "target", "said"),
    [
        ("ap50", 0.5, "no number of an evaluation"),
        ("f1_clas_50", 0.5, "did you mean f1_class_50"),
        ("map_50", 50.0, "map_50 is a share from 0 to 1"),
    ],
)
def test_a_number_that_no_evaluation_has_is_refused_before_anything_starts(
    tmp_path: Path, metric: str, target: float, said: str
) -> None:
    mapping = make_mapping()
    put(mapping, "training.eval_every_steps", 10)
    put(mapping, "training.early_stop.metric", metric)
    put(mapping, "training.early_stop.target", target)

    report = refusal(tmp_path, mapping)

    assert said in report
    assert "training.early_stop." in report


@pytest.mark.req("U-5")
@pytest.mark.parametrize(
    ("metric", "target"), [("eval_rollout_map_50", 0.4), ("duplicates", 3.0), ("dropped_wrong_arity", 0.0)]
)
def test_every_number_of_an_evaluation_may_be_watched(tmp_path: Path, metric: str, target: float) -> None:
    mapping = make_mapping()
    put(mapping, "training.eval_every_steps", 10)
    put(mapping, "training.early_stop.metric", metric)
    put(mapping, "training.early_stop.target", target)

    stop = load_mapping(tmp_path, mapping).training.early_stop

    assert (stop.metric, stop.target) == (metric.removeprefix("eval_rollout_"), target)
