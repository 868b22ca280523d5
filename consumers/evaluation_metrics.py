"""Validation metrics from evaluation results: micro counts over all images, then COCO AP.

Pure: it reads the plain maps that the matcher makes of greedy
rollouts; it never packs, trains or generates [P-12].
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.evaluation_numbers import DROPPED, IOU_THRESHOLDS, PREFIX
from consumers.average_precision import AveragePrecision, Detection, GroundTruthShape, average_precision

Result = Mapping[str, Any]
_SHOWN_IOUS: Final = (("_50", 0.5), ("_95", 0.95))


def evaluation_metrics(results: Sequence[Result], *, num_unanswered: int = 0) -> dict[str, float]:
    """Return the metrics of ROLLOUT_MATCHING section 10 for evaluation results, keys ``eval_rollout_…``.

    A result is the body of an EvaluationResult. What each number means is in ``evaluation_numbers``. Shares
    are 0 where there is nothing to divide by; AP is absent where a prediction has no log-probability, AP of a
    size where nothing of it is labelled. Neither the order of results nor the names of their records matter;
    no results: all zero.
    ``num_unanswered`` images have no result: their rollouts were refused or given up.
    Raises DataError for a result without one of the keys.
    """
    ordered = sorted(results, key=_content)
    counts = _count(ordered)
    num_predictions, num_truth = counts["pred_objects"], counts["gt_objects"]
    metrics: dict[str, float] = {}
    for suffix, class_suffix, matched in _pairs(counts):
        for name, value in _scores(matched, num_predictions, num_truth).items():
            metrics[f"{name}{class_suffix}{suffix}"] = value
    metrics |= {
        "label_accuracy": _ratio(counts["labels_right"], counts["matched"]),
        "pred_objects": num_predictions,
        "gt_objects": num_truth,
        "matched": counts["matched"],
        "fp": num_predictions - counts["matched"],
        "fn": num_truth - counts["matched"],
        "samples": len(ordered),
        "unanswered": num_unanswered,
        "duplicates": counts["duplicates"],
        "duplicates_per_image": _ratio(counts["duplicates"], len(ordered)),
        "parse_truncated_rate": _ratio(counts["truncated"], len(ordered)),
        "parse_invalid_rate": _ratio(counts["invalid"], len(ordered)),
    }
    metrics |= {name: count for name, count in sorted(counts.items()) if name.startswith(DROPPED)}
    metrics |= _precision_over_scores(ordered)
    return {f"{PREFIX}{name}": float(value) for name, value in metrics.items()}


def class_numbers(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return for each class, most labelled first, objects labelled and written, AP and AP50 if known."""
    ordered = sorted(results, key=_content)
    labelled = Counter(str(item["desc"]) for result in ordered for item in result["ground_truth"])
    written = Counter(str(item["desc"]) for result in ordered for item in result["predictions"])
    precision = _precision(ordered)
    numbers: dict[str, dict[str, float]] = {}
    for name, amount in sorted(labelled.items(), key=lambda item: (-item[1], item[0])):
        numbers[name] = {"gt_objects": amount, "pred_objects": written[name]}
        if precision is not None:
            numbers[name]["map"], numbers[name]["map_50"] = precision.by_class[name]
    return numbers


def _content(result: Result) -> str:
    """Return what a result is sorted by: what it holds. A record's name must not decide between scores."""
    held = [result.get("ground_truth"), result.get("predictions"), result.get("image")]
    return json.dumps(held, sort_keys=True, default=str)


def _count(results: Sequence[Result]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for result in results:
        try:
            overlaps = result["overlaps"]
            counts["pred_objects"] += len(result["predictions"])
            counts["gt_objects"] += len(result["ground_truth"])
            counts["matched"] += int(result["num_matched"])
            for name in ("matched_class", "labels_right", "duplicates"):
                counts[name] += int(overlaps[name])
            for name in ("any_class", "right_class"):
                counts.update(
                    {f"{name} {iou}": n for iou, n in zip(IOU_THRESHOLDS, overlaps[name], strict=True)}
                )
            counts["truncated"] += int(result["truncated"])
            counts["invalid"] += int(result["is_invalid_rollout"])
            counts.update({f"{DROPPED}{reason}": int(n) for reason, n in result["dropped"].items()})
        except KeyError as exc:
            raise DataError(
                f"evaluation result {result.get('record_id', '?')}: got no {exc.args[0]!r}, "
                f"expected what the matcher writes (keys here: {', '.join(sorted(result))})"
            ) from exc
    return counts


def _pairs(counts: Counter[str]) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Yield (suffix, class suffix, matched objects at each IoU that the number is a mean over)."""
    for class_suffix, at_gate, name in (
        ("", "matched", "any_class"),
        ("_class", "matched_class", "right_class"),
    ):
        yield "", class_suffix, [counts[at_gate]]
        for suffix, iou in _SHOWN_IOUS:
            yield suffix, class_suffix, [counts[f"{name} {iou}"]]
        yield "_miou", class_suffix, [counts[f"{name} {iou}"] for iou in IOU_THRESHOLDS]


def _scores(matched: Sequence[int], num_predictions: int, num_truth: int) -> dict[str, float]:
    mean = sum(matched) / len(matched)
    return {
        "precision": _ratio(mean, num_predictions),
        "recall": _ratio(mean, num_truth),
        "f1": _ratio(2 * mean, num_predictions + num_truth),
    }


def _precision_over_scores(results: Sequence[Result]) -> dict[str, float]:
    named, alike = _precision(results), _precision(results, is_class_agnostic=True)
    if named is None or alike is None:
        return {}
    return {
        "map": named.mean,
        "map_50": named.at(0.5),
        "map_75": named.at(0.75),
        **{f"map_{size}": value for size, value in named.by_size.items()},
        "mar": named.recall,
        "map_class_agnostic": alike.mean,
        "map_50_class_agnostic": alike.at(0.5),
    }


def _precision(results: Sequence[Result], *, is_class_agnostic: bool = False) -> AveragePrecision | None:
    """Return COCO's numbers, None where a prediction has no score: the order of its file would rank it."""
    truth = [
        GroundTruthShape(image=index, **_shape(item, result))
        for index, result in enumerate(results)
        for item in result["ground_truth"]
    ]
    predicted = [
        (index, result, item) for index, result in enumerate(results) for item in result["predictions"]
    ]
    if any(item.get("logprob_score") is None for _, _, item in predicted):
        return None
    found = [
        Detection(image=index, score=item["logprob_score"], **_shape(item, result))
        for index, result, item in predicted
    ]
    return average_precision(truth, found, is_class_agnostic=is_class_agnostic)


def _shape(item: Mapping[str, Any], result: Result) -> dict[str, Any]:
    bins, image = item["bbox_2d"] if "bbox_2d" in item else item["poly"], result["image"]
    return {
        "desc": item["desc"],
        "bins": tuple(bins),
        "is_polygon": "poly" in item,
        "image_pixels": int(image["width"]) * int(image["height"]),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
