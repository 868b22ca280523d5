"""How the objects of one rollout meet its ground truth at every IoU, with and without their classes.

Pure; section 10 of the method. It must not know records, scores or sums over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from broker_schemas.errors import MalformedRecord
from broker_schemas.method.evaluation_numbers import IOU_THRESHOLDS
from broker_schemas.records.body_fields import BodyReader
from consumers.matching import MatchResult, MatchSettings, candidate_ious
from consumers.shapes import Shape

DUPLICATE_IOU: Final = 0.9


class NamedShape(Shape, Protocol):
    """A shape with its class."""

    @property
    def desc(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapCounts:
    """Counts of one rollout; the tuples hold an entry for each of IOU_THRESHOLDS.

    ``matched_class``: most pairs of one class at the gate. ``labels_right``: pairs of the class-agnostic
    match with one class. ``duplicates``: predictions that repeat an earlier one. ``any_class``,
    ``right_class``: most pairs at each IoU.
    """

    matched_class: int = 0
    labels_right: int = 0
    duplicates: int = 0
    any_class: tuple[int, ...] = (0,) * len(IOU_THRESHOLDS)
    right_class: tuple[int, ...] = (0,) * len(IOU_THRESHOLDS)

    def to_body(self) -> dict[str, Any]:
        return {
            "matched_class": self.matched_class,
            "labels_right": self.labels_right,
            "duplicates": self.duplicates,
            "any_class": list(self.any_class),
            "right_class": list(self.right_class),
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str, *, at_most: int) -> OverlapCounts:
        """Return the counts in ``body``, none above ``at_most``; raises MalformedRecord."""
        read = BodyReader(body, where)
        by_iou = {}
        for name in ("any_class", "right_class"):
            by_iou[name] = tuple(read.int_list(name, low=0, high=at_most))
            if len(by_iou[name]) != len(IOU_THRESHOLDS):
                raise MalformedRecord(
                    f"{where}.{name}: got {len(by_iou[name])} counts, expected {len(IOU_THRESHOLDS)}"
                )
        return cls(
            matched_class=read.integer("matched_class", low=0, high=at_most),
            labels_right=read.integer("labels_right", low=0, high=at_most),
            duplicates=read.integer("duplicates", low=0),
            **by_iou,
        )


def count_overlaps(
    predictions: Sequence[NamedShape],
    ground_truth: Sequence[NamedShape],
    match: MatchResult,
    settings: MatchSettings,
) -> OverlapCounts:
    """Return the counts of predictions (P) against ground truth (G), whose ``match`` is that at the gate.

    IoU as in section 5; classes are equal where ``desc`` is.
    """
    duplicates = len(duplicate_predictions(predictions, settings))
    if not predictions or not ground_truth:
        return OverlapCounts(duplicates=duplicates)
    lowest = min(settings.maskiou_gate, IOU_THRESHOLDS[0])
    overlap = _ious(predictions, ground_truth, replace(settings, maskiou_gate=lowest))
    named = np.array([[one.desc == other.desc for other in ground_truth] for one in predictions])
    of_class = np.where(named, overlap, -1.0)
    return OverlapCounts(
        matched_class=_num_pairs(of_class >= settings.maskiou_gate),
        labels_right=int(sum(named[pair] for pair in match.pairs)),
        duplicates=duplicates,
        any_class=tuple(_num_pairs(overlap >= iou) for iou in IOU_THRESHOLDS),
        right_class=tuple(_num_pairs(of_class >= iou) for iou in IOU_THRESHOLDS),
    )


def duplicate_predictions(predictions: Sequence[NamedShape], settings: MatchSettings) -> tuple[int, ...]:
    """Return the rising indices of predictions with DUPLICATE_IOU to an earlier one of their class."""
    if len(predictions) < 2:
        return ()
    close = replace(settings, maskiou_gate=DUPLICATE_IOU, candidate_top_k=settings.candidate_top_k + 1)
    by_class: dict[str, list[int]] = {}
    for index, item in enumerate(predictions):
        by_class.setdefault(item.desc, []).append(index)
    found: list[int] = []
    for members in by_class.values():
        if len(members) > 1:
            shapes = [predictions[index] for index in members]
            repeats = np.tril(_ious(shapes, shapes, close) >= DUPLICATE_IOU, k=-1).any(axis=1)
            found += [members[place] for place in np.flatnonzero(repeats)]
    return tuple(sorted(found))


def _ious(
    rows: Sequence[NamedShape], columns: Sequence[NamedShape], settings: MatchSettings
) -> NDArray[np.float64]:
    """Return the IoU (R, C), -1 where a pair was not looked at: candidates alone, where masks are needed."""
    has_masks = any(shape.geometry == "poly" for shape in (*rows, *columns))
    looked_at = settings if has_masks else replace(settings, candidate_top_k=len(columns))
    return np.nan_to_num(candidate_ious(rows, columns, looked_at), nan=-1.0)


def _num_pairs(feasible: NDArray[np.bool_]) -> int:
    """Return the most pairs that can be made of ``feasible`` (P, G), each row and column at most once."""
    if not feasible.any():
        return 0
    if feasible.sum(axis=0).max() <= 1 and feasible.sum(axis=1).max() <= 1:
        return int(feasible.sum())
    return int((maximum_bipartite_matching(csr_matrix(feasible), perm_type="column") >= 0).sum())
