"""Validation metrics: micro counts by hand, empty cases, and COCO mAP against small worked examples."""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker_schemas.errors import DataError
from learner.average_precision import Detection, GroundTruthShape, mean_average_precision
from learner.evaluation import evaluation_metrics

SQUARE = [100, 100, 300, 300]


def shape(bins: list[int], desc: str = "cell", **changes: Any) -> dict[str, Any]:
    name = "bbox_2d" if len(bins) == 4 else "poly"
    return {"desc": desc, name: bins, **changes}


def prediction(bins: list[int], desc: str = "cell", score: float | None = 0.5) -> dict[str, Any]:
    return shape(bins, desc, score=1.0, logprob_score=score)


def result(
    record_id: str = "r-0",
    *,
    predictions: list[dict[str, Any]] | None = None,
    ground_truth: list[dict[str, Any]] | None = None,
    num_matched: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    return {
        "record_id": record_id,
        "predictions": [prediction(SQUARE)] if predictions is None else predictions,
        "ground_truth": [shape(SQUARE)] if ground_truth is None else ground_truth,
        "num_matched": num_matched,
        "truncated": 0,
        "is_invalid_rollout": 0,
        "dropped": {},
        **changes,
    }


def test_micro_precision_recall_and_f1_are_those_worked_by_hand() -> None:
    """3 matched of 4 predicted and 6 labelled: precision 3/4, recall 1/2, F1 = 6/10."""
    results = [
        result("r-0", predictions=[prediction(SQUARE)] * 3, ground_truth=[shape(SQUARE)] * 2, num_matched=2),
        result("r-1", predictions=[prediction(SQUARE)], ground_truth=[shape(SQUARE)] * 4, num_matched=1),
    ]
    metrics = evaluation_metrics(results)
    assert metrics["eval_rollout_precision"] == 0.75
    assert metrics["eval_rollout_recall"] == 0.5
    assert metrics["eval_rollout_f1"] == pytest.approx(0.6)
    counted = {name: metrics[f"eval_rollout_{name}"] for name in ("pred_objects", "gt_objects", "matched")}
    assert counted == {"pred_objects": 4, "gt_objects": 6, "matched": 3}
    assert (metrics["eval_rollout_fp"], metrics["eval_rollout_fn"]) == (1, 3)


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result(predictions=[], num_matched=0)],
        [result(ground_truth=[], num_matched=0)],
        [result(predictions=[], ground_truth=[], num_matched=0)],
    ],
    ids=["no results", "no predictions", "no ground truth", "neither"],
)
def test_empty_cases_are_zero(results: list[dict[str, Any]]) -> None:
    metrics = evaluation_metrics(results)
    for name in ("precision", "recall", "f1", "map", "map_50", "matched"):
        assert metrics[f"eval_rollout_{name}"] == 0, name


def test_rates_and_drops_are_counted_over_rollouts() -> None:
    results = [
        result("r-0", truncated=1, dropped={"wrong_arity": 2, "bbox_invalid": 1}),
        result("r-1", is_invalid_rollout=1, dropped={"wrong_arity": 1}),
        result("r-2"),
        result("r-3"),
    ]
    metrics = evaluation_metrics(results)
    assert metrics["eval_rollout_parse_truncated_rate"] == 0.25
    assert metrics["eval_rollout_parse_invalid_rate"] == 0.25
    assert metrics["eval_rollout_dropped_wrong_arity"] == 3
    assert metrics["eval_rollout_dropped_bbox_invalid"] == 1


def test_the_order_of_results_does_not_matter() -> None:
    rng = random.Random(5)
    results = [
        result(
            f"r-{index}",
            predictions=[prediction([10 * index, 10, 200 + 20 * index, 400], score=rng.random())],
            ground_truth=[shape([10 * index, 20, 220 + 15 * index, 410])],
        )
        for index in range(12)
    ]
    metrics = evaluation_metrics(results)
    assert 0 < metrics["eval_rollout_map"] < 1
    for _ in range(3):
        rng.shuffle(results)
        assert evaluation_metrics(results) == metrics


def test_a_result_without_a_key_is_refused_by_name() -> None:
    broken = result("r-9")
    del broken["num_matched"]
    with pytest.raises(DataError, match="r-9.*num_matched"):
        evaluation_metrics([broken])


def test_map_from_log_probability_is_absent_where_a_prediction_has_none() -> None:
    unscored = result(predictions=[prediction(SQUARE, score=None)])
    assert "eval_rollout_map_logprob" not in evaluation_metrics([unscored])
    assert evaluation_metrics([result()])["eval_rollout_map_logprob"] == pytest.approx(1.0)


def test_scores_order_the_predictions() -> None:
    """One right and one wrong box: right first gives AP 1, wrong first gives precision 1/2 everywhere."""
    right, wrong = prediction(SQUARE, score=0.9), prediction([600, 600, 900, 900], score=0.1)
    good = result(predictions=[wrong, right])
    assert evaluation_metrics([good])["eval_rollout_map_logprob"] == pytest.approx(1.0)
    bad = result(predictions=[{**wrong, "logprob_score": 0.95}, right])
    assert evaluation_metrics([bad])["eval_rollout_map_logprob"] == pytest.approx(0.5)


def test_a_box_with_iou_0_6_has_the_ap_worked_by_hand() -> None:
    """IoU 0.6 counts at the thresholds 0.5, 0.55 and 0.6 of ten: AP 0.3; at 0.5 alone 1."""
    truth = [GroundTruthShape(image=0, desc="cell", bins=(0, 0, 100, 100), is_polygon=False)]
    found = [Detection(image=0, desc="cell", bins=(0, 0, 100, 61), is_polygon=False, score=1.0)]
    assert mean_average_precision(truth, found) == pytest.approx(0.3)
    assert mean_average_precision(truth, found, iou_thresholds=(0.5,)) == pytest.approx(1.0)


def test_classes_count_unless_told_otherwise() -> None:
    truth = [GroundTruthShape(image=0, desc="cell", bins=(0, 0, 100, 100), is_polygon=False)]
    found = [Detection(image=0, desc="leaf", bins=(0, 0, 100, 100), is_polygon=False, score=1.0)]
    assert mean_average_precision(truth, found) == 0
    assert mean_average_precision(truth, found, is_class_agnostic=True) == pytest.approx(1.0)


def test_a_polygon_is_compared_as_a_mask() -> None:
    """A triangle fills half of its box: IoU 0.5 with it, so the box is found at 0.4 and not at 0.6."""
    truth = [GroundTruthShape(image=3, desc="leaf", bins=(0, 0, 400, 0, 0, 400), is_polygon=True)]
    found = [Detection(image=3, desc="leaf", bins=(0, 0, 400, 400), is_polygon=False, score=1.0)]
    assert mean_average_precision(truth, found, iou_thresholds=(0.4,)) == pytest.approx(1.0)
    assert mean_average_precision(truth, found, iou_thresholds=(0.6,)) == 0
    same = [Detection(image=3, desc="leaf", bins=truth[0].bins, is_polygon=True, score=1.0)]
    assert mean_average_precision(truth, same) == pytest.approx(1.0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation_metrics([result()])
    assert capsys.readouterr().out == ""
