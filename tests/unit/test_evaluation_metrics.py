"""Validation metrics: micro counts by hand, empty cases, and COCO AP against small worked examples."""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.evaluation_numbers import NUMBERS, PREFIX
from broker_schemas.records.records import GroundTruthObject
from consumers.average_precision import AveragePrecision, Detection, GroundTruthShape, average_precision
from consumers.evaluation_metrics import class_numbers, evaluation_metrics
from consumers.matching import match_objects
from consumers.overlap_counts import count_overlaps
from tests.builders.settings import match_settings

SQUARE = [100, 100, 300, 300]
FRAME = [0, 0, 999, 999]
GATE = match_settings()


def shape(bins: list[int], desc: str = "cell", **changes: Any) -> dict[str, Any]:
    name = "bbox_2d" if len(bins) == 4 else "poly"
    return {"desc": desc, name: bins, **changes}


def prediction(bins: list[int], desc: str = "cell", score: float | None = 0.5) -> dict[str, Any]:
    return shape(bins, desc, logprob_score=score)


def as_object(item: dict[str, Any]) -> GroundTruthObject:
    geometry: Any = "bbox_2d" if "bbox_2d" in item else "poly"
    return GroundTruthObject(desc=item["desc"], geometry=geometry, bins=tuple(item[geometry]))


def result(
    record_id: str = "r-0",
    *,
    predictions: list[dict[str, Any]] | None = None,
    ground_truth: list[dict[str, Any]] | None = None,
    num_matched: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a result as the matcher writes it: matched and counted by its own functions."""
    said = [prediction(SQUARE)] if predictions is None else predictions
    truth = [shape(SQUARE)] if ground_truth is None else ground_truth
    shapes, labelled = [as_object(item) for item in said], [as_object(item) for item in truth]
    match = match_objects(shapes, labelled, GATE)
    return {
        "record_id": record_id,
        "image": {"width": 100, "height": 100},
        "predictions": said,
        "ground_truth": truth,
        "num_matched": len(match.pairs) if num_matched is None else num_matched,
        "overlaps": count_overlaps(shapes, labelled, match, GATE).to_body(),
        "truncated": 0,
        "is_invalid_rollout": 0,
        "dropped": {},
        **changes,
    }


def metric(results: list[dict[str, Any]], name: str) -> float:
    return evaluation_metrics(results)[f"{PREFIX}{name}"]


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
        [result(predictions=[])],
        [result(ground_truth=[])],
        [result(predictions=[], ground_truth=[])],
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


def test_ap_is_absent_where_a_prediction_has_no_log_probability() -> None:
    unscored = result(predictions=[prediction(SQUARE, score=None)])
    assert not [name for name in evaluation_metrics([unscored]) if "map" in name]
    assert metric([result()], "map") == pytest.approx(1.0)
    assert metric([result(predictions=[])], "map") == 0


def test_scores_order_the_predictions() -> None:
    """One right and one wrong box: right first gives AP 1, wrong first gives precision 1/2 everywhere."""
    right, wrong = prediction(SQUARE, score=0.9), prediction([600, 600, 900, 900], score=0.1)
    assert metric([result(predictions=[wrong, right])], "map") == pytest.approx(1.0)
    bad = result(predictions=[{**wrong, "logprob_score": 0.95}, right])
    assert metric([bad], "map") == pytest.approx(0.5)


@pytest.mark.req("U-5")
def test_the_names_of_records_decide_nothing_even_where_all_scores_are_one() -> None:
    rng = random.Random(3)
    results = []
    for index in range(20):
        truth = shape([10 * index, 10, 200 + 20 * index, 400])
        said = truth if index % 2 else shape(FRAME)
        results.append(
            result(f"r-{index:02}", predictions=[{**said, "logprob_score": 0.5}], ground_truth=[truth])
        )
    wanted = evaluation_metrics(results)
    assert 0 < wanted["eval_rollout_map"] < 1
    for _ in range(5):
        names = [f"r-{place:02}" for place in range(20)]
        rng.shuffle(names)
        renamed = [{**item, "record_id": name} for item, name in zip(results, names, strict=True)]
        assert evaluation_metrics(sorted(renamed, key=lambda item: str(item["record_id"]))) == wanted


@pytest.mark.req("U-5")
def test_a_model_that_draws_the_frame_of_every_picture_is_seen_through() -> None:
    """One object over 40 % of each picture: found at the gate 0.3, and nowhere from 0.5 on."""
    results = [
        result(f"r-{index}", predictions=[prediction(FRAME)], ground_truth=[shape([0, 0, 999, 400])])
        for index in range(4)
    ]
    found = {name: metric(results, name) for name in ("f1", "f1_class", "f1_50", "f1_class_50", "f1_miou")}
    assert found == {"f1": 1.0, "f1_class": 1.0, "f1_50": 0.0, "f1_class_50": 0.0, "f1_miou": 0.0}


@pytest.mark.req("U-5")
def test_labels_at_chance_show_beside_boxes_that_are_right() -> None:
    """Four boxes found, one name right: F1 1 for any class, 1/4 for the right one."""
    boxes = [[100 * place, 0, 100 * place + 80, 500] for place in range(4)]
    truth = [shape(box, name) for box, name in zip(boxes, "abcd", strict=True)]
    said = [prediction(box, name) for box, name in zip(boxes, "abba", strict=True)]
    said[1]["desc"] = "c"
    results = [result(predictions=said, ground_truth=truth)]
    assert metric(results, "f1") == metric(results, "f1_50") == metric(results, "map_class_agnostic") == 1.0
    assert metric(results, "f1_class") == metric(results, "f1_class_50") == 0.25
    assert metric(results, "label_accuracy") == 0.25
    assert metric(results, "map") == pytest.approx(0.25)


def test_f1_by_mean_iou_is_that_worked_by_hand() -> None:
    """IoU 0.6 counts at three of the ten thresholds: F1 is 1 there and 0 elsewhere."""
    results = [result(predictions=[prediction([0, 0, 100, 60])], ground_truth=[shape([0, 0, 100, 100])])]
    assert metric(results, "f1_miou") == metric(results, "f1_class_miou") == pytest.approx(0.3)
    assert (metric(results, "f1_50"), metric(results, "f1_95")) == (1.0, 0.0)


def test_a_wrong_pair_does_not_take_the_place_of_a_right_one() -> None:
    """Two labelled boxes of which one is near both predictions: the class decides who gets it."""
    truth = [shape([0, 0, 100, 100], "a"), shape([0, 0, 100, 104], "b")]
    said = [prediction([0, 0, 100, 102], "b"), prediction([0, 0, 100, 101], "a")]
    results = [result(predictions=said, ground_truth=truth)]
    assert metric(results, "f1_class_50") == metric(results, "f1_50") == 1.0


@pytest.mark.req("U-5")
def test_repeated_objects_are_counted_by_class() -> None:
    close = [100, 100, 300, 301]
    said = [
        prediction(SQUARE),
        prediction(close),
        prediction(SQUARE, "leaf"),
        prediction([600, 600, 700, 700]),
    ]
    outline = [100, 100, 300, 100, 300, 300]
    polygons = [prediction(outline), prediction(outline), prediction(outline)]
    results = [result("r-0", predictions=said), result("r-1", predictions=polygons)]
    assert metric(results, "duplicates") == 3
    assert metric(results, "duplicates_per_image") == 1.5
    assert metric([result(predictions=[prediction(SQUARE)] * 101)], "duplicates") == 100


@pytest.mark.req("U-5")
def test_perfect_predictions_of_150_objects_have_ap_1() -> None:
    boxes = [
        [60 * (place % 15), 60 * (place // 15), 60 * (place % 15) + 50, 60 * (place // 15) + 50]
        for place in range(150)
    ]
    results = [
        result(predictions=[prediction(box) for box in boxes], ground_truth=[shape(box) for box in boxes])
    ]
    for name in ("map", "map_50", "map_75", "mar", "map_class_agnostic", "f1_95", "f1_class_95"):
        assert metric(results, name) == pytest.approx(1.0), name


def test_ap_by_size_is_of_pixels_and_absent_where_nothing_has_it() -> None:
    """A box of 200 x 200 bins is 20 x 20 pixels of a 100 x 100 image and 200 x 200 of a 999 x 999 one."""
    small, large = result(), result(image={"width": 999, "height": 999})
    assert "eval_rollout_map_large" not in evaluation_metrics([small])
    assert metric([small], "map_small") == metric([large], "map_large") == pytest.approx(1.0)
    assert "eval_rollout_map_small" not in evaluation_metrics([large])


def test_every_number_is_named_and_every_name_is_a_number() -> None:
    named = {f"{PREFIX}{name}" for name in NUMBERS}
    sizes = [result(f"r-{side}", image={"width": side, "height": side}) for side in (100, 250, 999)]
    dropped = {name.removeprefix("dropped_"): 1 for name in NUMBERS if name.startswith("dropped_")}
    assert set(evaluation_metrics([*sizes, result(dropped=dropped)])) == named


@pytest.mark.req("U-5")
def test_each_class_has_its_numbers() -> None:
    truth = [shape(SQUARE, "leaf"), shape([600, 600, 900, 900], "cell"), shape([0, 600, 200, 900], "cell")]
    said = [prediction(SQUARE, "leaf"), prediction([600, 600, 900, 900], "cell")]
    found = class_numbers([result(predictions=said, ground_truth=truth)])
    assert list(found) == ["cell", "leaf"]
    assert found["leaf"] == pytest.approx({"gt_objects": 1, "pred_objects": 1, "map": 1.0, "map_50": 1.0})
    assert found["cell"]["map_50"] == pytest.approx(51 / 101)
    unscored = class_numbers([result(predictions=[prediction(SQUARE, score=None)])])
    assert unscored == {"cell": {"gt_objects": 1, "pred_objects": 1}}


def precision(truth: list[GroundTruthShape], found: list[Detection], **others: bool) -> AveragePrecision:
    return average_precision(truth, found, **others)


def test_a_box_with_iou_0_6_has_the_ap_worked_by_hand() -> None:
    """IoU 0.6 counts at the thresholds 0.5, 0.55 and 0.6 of ten: AP 0.3; at 0.5 alone 1."""
    truth = [GroundTruthShape(image=0, desc="cell", bins=(0, 0, 100, 100), is_polygon=False)]
    found = [Detection(image=0, desc="cell", bins=(0, 0, 100, 61), is_polygon=False, score=1.0)]
    assert precision(truth, found).mean == pytest.approx(0.3)
    assert precision(truth, found).at(0.5) == pytest.approx(1.0)


def test_classes_count_unless_told_otherwise() -> None:
    truth = [GroundTruthShape(image=0, desc="cell", bins=(0, 0, 100, 100), is_polygon=False)]
    found = [Detection(image=0, desc="leaf", bins=(0, 0, 100, 100), is_polygon=False, score=1.0)]
    assert precision(truth, found).mean == 0
    assert precision(truth, found, is_class_agnostic=True).mean == pytest.approx(1.0)


def test_a_polygon_is_compared_as_a_mask() -> None:
    """A triangle fills half of its box, so the box is not found from 0.55 on."""
    truth = [GroundTruthShape(image=3, desc="leaf", bins=(0, 0, 400, 0, 0, 400), is_polygon=True)]
    found = [Detection(image=3, desc="leaf", bins=(0, 0, 400, 400), is_polygon=False, score=1.0)]
    assert precision(truth, found).by_iou[1:] == (0.0,) * 9
    same = [Detection(image=3, desc="leaf", bins=truth[0].bins, is_polygon=True, score=1.0)]
    assert precision(truth, same).mean == pytest.approx(1.0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation_metrics([result()])
    assert capsys.readouterr().out == ""
