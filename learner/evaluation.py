"""Validation metrics from evaluation results: micro counts over all images, then COCO mAP.

Pure: it reads the plain maps that the matcher makes of greedy
rollouts; it never packs, trains or generates [P-12].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from broker_schemas.errors import DataError
from learner.average_precision import Detection, GroundTruthShape, mean_average_precision

PREFIX = "eval_rollout_"


def evaluation_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of ROLLOUT_MATCHING section 10 for evaluation results, keys ``eval_rollout_…``.

    A result holds ``predictions`` (``desc``, geometry, ``score``, ``logprob_score``), ``ground_truth``,
    ``num_matched``, ``truncated``, ``is_invalid_rollout`` and ``dropped``. Micro precision, recall and F1
    are 0 where their denominator is. ``map`` scores all predictions alike, ``map_logprob`` by token
    log-probability and is absent where a prediction has none. The order of results does not matter; no
    results: all zero.
    Raises DataError for a result without one of the keys.
    """
    ordered = sorted(results, key=lambda result: str(result.get("record_id", "")))
    counts = _count(ordered)
    num_predictions, num_truth, num_matched = counts["pred_objects"], counts["gt_objects"], counts["matched"]
    precision, recall = _ratio(num_matched, num_predictions), _ratio(num_matched, num_truth)
    metrics: dict[str, float] = {
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * num_matched, num_predictions + num_truth),
        "pred_objects": num_predictions,
        "gt_objects": num_truth,
        "matched": num_matched,
        "fp": num_predictions - num_matched,
        "fn": num_truth - num_matched,
        "samples": len(ordered),
        "parse_truncated_rate": _ratio(counts["truncated"], len(ordered)),
        "parse_invalid_rate": _ratio(counts["invalid"], len(ordered)),
    }
    for name, count in sorted(counts.items()):
        if name.startswith("dropped_"):
            metrics[name] = count
    metrics |= _precision_over_scores(ordered)
    return {f"{PREFIX}{name}": float(value) for name, value in metrics.items()}


def _count(results: Sequence[Mapping[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for result in results:
        try:
            counts["pred_objects"] += len(result["predictions"])
            counts["gt_objects"] += len(result["ground_truth"])
            counts["matched"] += int(result["num_matched"])
            counts["truncated"] += int(result["truncated"])
            counts["invalid"] += int(result["is_invalid_rollout"])
            counts.update({f"dropped_{reason}": int(n) for reason, n in result["dropped"].items()})
        except KeyError as exc:
            raise DataError(
                f"evaluation result {result.get('record_id', '?')}: got no {exc.args[0]!r}, "
                f"expected what the matcher writes (keys here: {', '.join(sorted(result))})"
            ) from exc
    return counts


def _precision_over_scores(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    truth = [
        GroundTruthShape(image=index, **_shape(item))
        for index, result in enumerate(results)
        for item in result["ground_truth"]
    ]
    predicted = [(index, item) for index, result in enumerate(results) for item in result["predictions"]]
    alike = [Detection(image=index, score=item["score"], **_shape(item)) for index, item in predicted]
    metrics = {
        "map": mean_average_precision(truth, alike),
        "map_50": mean_average_precision(truth, alike, iou_thresholds=(0.5,)),
        "map_class_agnostic": mean_average_precision(truth, alike, is_class_agnostic=True),
    }
    if predicted and all(item["logprob_score"] is not None for _, item in predicted):
        scored = [
            Detection(image=index, score=item["logprob_score"], **_shape(item)) for index, item in predicted
        ]
        metrics["map_logprob"] = mean_average_precision(truth, scored)
    return metrics


def _shape(item: Mapping[str, Any]) -> dict[str, Any]:
    bins = item["bbox_2d"] if "bbox_2d" in item else item["poly"]
    return {"desc": item["desc"], "bins": tuple(bins), "is_polygon": "poly" in item}


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0
