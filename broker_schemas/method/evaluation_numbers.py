"""The numbers of an evaluation: their names, what each means, and which way is better [U-5].

Owns names and words; it does not know how a number is worked out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from broker_schemas.records.reasons import OBJECT_DROP_REASONS

PREFIX: Final = "eval_rollout_"
GATE: Final = "{gate}"
"""Stands in the words of a number for the IoU at which the run matches, ``maskiou_gate``."""
IOU_THRESHOLDS: Final = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU 0.5 to 0.95 in steps of 0.05, as COCO has them."""
DROPPED: Final = "dropped_"
Form = Literal["share", "count"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationNumber:
    """A number by its ``name`` without PREFIX; ``words`` say what it is, ``form`` whether it is 0 to 1."""

    name: str
    words: str
    form: Form = "share"
    is_lower_better: bool = False


def _overlap_numbers() -> Iterator[EvaluationNumber]:
    for name, title in (("f1", "F1"), ("precision", "precision"), ("recall", "recall")):
        for suffix, iou in (("", GATE), ("_50", "0.5"), ("_95", "0.95"), ("_miou", "0.5 to 0.95, mean")):
            yield EvaluationNumber(name=f"{name}{suffix}", words=f"{title}, any class, IoU {iou}")
            yield EvaluationNumber(name=f"{name}_class{suffix}", words=f"{title}, right class, IoU {iou}")


def _counts() -> Iterator[EvaluationNumber]:
    for name, words in (
        ("samples", "images"),
        ("gt_objects", "objects labelled"),
        ("pred_objects", "objects written"),
        ("matched", "objects matched, any class"),
    ):
        yield EvaluationNumber(name=name, words=words, form="count")
    for name, words in (
        ("fp", "objects written and not matched, any class"),
        ("fn", "objects labelled and not matched, any class"),
        ("duplicates", "objects written again: same class, IoU 0.9 to an earlier one"),
        ("unanswered", "images without an answer: refused or given up"),
        ("duplicates_per_image", "objects written again, an image"),
    ):
        yield EvaluationNumber(name=name, words=words, form="count", is_lower_better=True)


def _failures() -> Iterator[EvaluationNumber]:
    for name, words in (
        ("parse_truncated_rate", "share of rollouts cut off"),
        ("parse_invalid_rate", "share of rollouts without a usable answer"),
    ):
        yield EvaluationNumber(name=name, words=words, is_lower_better=True)
    for reason in OBJECT_DROP_REASONS:
        words = f"objects dropped in parsing: {reason.replace('_', ' ')}"
        yield EvaluationNumber(name=f"{DROPPED}{reason}", words=words, form="count", is_lower_better=True)


NUMBERS: Final[dict[str, EvaluationNumber]] = {
    item.name: item
    for item in (
        *_overlap_numbers(),
        EvaluationNumber(name="label_accuracy", words="share of matched objects with the right class"),
        EvaluationNumber(name="map", words="COCO AP, right class, IoU 0.5 to 0.95"),
        EvaluationNumber(name="map_50", words="COCO AP50, right class"),
        EvaluationNumber(name="map_75", words="COCO AP75, right class"),
        EvaluationNumber(name="map_small", words="COCO AP, right class, below 32 x 32 pixels"),
        EvaluationNumber(name="map_medium", words="COCO AP, right class, 32 x 32 to 96 x 96 pixels"),
        EvaluationNumber(name="map_large", words="COCO AP, right class, above 96 x 96 pixels"),
        EvaluationNumber(name="mar", words="COCO AR, right class, IoU 0.5 to 0.95"),
        EvaluationNumber(name="map_class_agnostic", words="COCO AP, any class, IoU 0.5 to 0.95"),
        EvaluationNumber(name="map_50_class_agnostic", words="COCO AP50, any class"),
        *_counts(),
        *_failures(),
    )
}
"""In reading order: what belongs together stands together."""

_SHORT: Final = {
    "f1": "F1 any class at the gate",
    "f1_50": "at IoU 0.5",
    "f1_class_50": "right class at IoU 0.5",
    "label_accuracy": "labels right",
    "map_50": "AP50",
}


def in_one_line(metrics: Mapping[str, float]) -> str:
    """Return the few numbers that say most, for a log: ``metrics`` by their keys with PREFIX."""
    parts = []
    for name, title in _SHORT.items():
        value = metrics.get(f"{PREFIX}{name}")
        if value is not None:
            parts.append(f"{title} {value:.3f}")
    return ", ".join(parts)


def words_of(name: str, gate: float | None = None) -> str:
    """Return what the number of this name means; ``gate`` is the run's ``maskiou_gate`` where it is known."""
    plain = name.removeprefix(PREFIX)
    words = NUMBERS[plain].words if plain in NUMBERS else plain.replace("_", " ")
    return words.replace(GATE, "at the gate" if gate is None else f"{gate:g} (the gate)")
