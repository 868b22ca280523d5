"""COCO average precision by pycocotools, on shapes in bins.

Bins stretch an image to a square, which leaves every IoU as it is. Where a polygon takes part all shapes are
compared as masks, else as boxes.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import NUM_BINS
from broker_schemas.method.evaluation_numbers import IOU_THRESHOLDS

_CANVAS: Final = NUM_BINS
_ALL: Final = "all"
# in pixels of the image, squared
_AREAS: Final = {_ALL: (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
_FEWEST_DETECTIONS: Final = 100
ANY_CLASS: Final = "object"


@dataclass(frozen=True, kw_only=True)
class GroundTruthShape:
    """A labelled shape: ``image`` (any number that names it), its ``desc`` as class, and its ``bins``.

    ``image_pixels`` is width times height of the image: areas of bins are scaled by it.
    """

    image: int
    desc: str
    bins: tuple[int, ...]
    is_polygon: bool
    image_pixels: int = _CANVAS * _CANVAS


@dataclass(frozen=True, kw_only=True)
class Detection(GroundTruthShape):
    """A predicted shape with its ``score``; higher comes first."""

    score: float


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """COCO's numbers. ``by_iou`` (T,) is AP at each of IOU_THRESHOLDS, ``by_size`` AP by objects' area.

    ``by_class``: class to its AP and AP50. A size that nothing labelled has is left out. ``recall`` is AR.
    """

    by_iou: tuple[float, ...] = (0.0,) * len(IOU_THRESHOLDS)
    recall: float = 0.0
    by_size: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """AP over IoU 0.5 to 0.95."""
        return sum(self.by_iou) / len(self.by_iou)

    def at(self, iou: float) -> float:
        """AP at one of IOU_THRESHOLDS."""
        return self.by_iou[IOU_THRESHOLDS.index(iou)]


def average_precision(
    truth: Sequence[GroundTruthShape], detections: Sequence[Detection], *, is_class_agnostic: bool = False
) -> AveragePrecision:
    """Return COCO's numbers of ``detections``; all 0 without truth or detections.

    Classes are the ``desc`` of the truth; a detection of another class counts nowhere, as COCO has it, unless
    ``is_class_agnostic``. At most 100 detections an image and class count, more where an image has more
    labelled objects. Detections of one score stand in the order given.
    """
    from pycocotools.cocoeval import COCOeval

    names = sorted({_class_of(item, is_class_agnostic) for item in truth})
    classes = {name: number for number, name in enumerate(names, start=1)}
    known = [item for item in detections if _class_of(item, is_class_agnostic) in classes]
    if not truth:
        return AveragePrecision()
    as_masks = any(item.is_polygon for item in [*truth, *known])
    # pycocotools tells its progress on stdout, which belongs to the command
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = _coco_index(truth, classes, as_masks, is_class_agnostic)
        found = _coco_index(known, classes, as_masks, is_class_agnostic)
        evaluation = COCOeval(annotated, found, "segm" if as_masks else "bbox")
        evaluation.params.imgIds = sorted({item.image for item in [*truth, *known]})
        evaluation.params.iouThrs = np.asarray(IOU_THRESHOLDS)
        evaluation.params.areaRng = [list(bounds) for bounds in _AREAS.values()]
        evaluation.params.areaRngLbl = list(_AREAS)
        evaluation.params.maxDets = [max(_FEWEST_DETECTIONS, *Counter(i.image for i in truth).values())]
        evaluation.evaluate()
        evaluation.accumulate()
    return _numbers(evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0], names)


def _numbers(
    precision_trka: NDArray[np.float64], recall_tka: NDArray[np.float64], names: Sequence[str]
) -> AveragePrecision:
    """Return means over what was measured (-1: nothing); axes are IoU, recall level, class, area."""
    whole_trk = precision_trka[..., 0]
    by_size = {
        size: _mean(precision_trka[..., place])
        for place, size in enumerate(_AREAS)
        if size != _ALL and (precision_trka[..., place] > -1).any()
    }
    return AveragePrecision(
        by_iou=tuple(_mean(values) for values in whole_trk),
        recall=_mean(recall_tka[..., 0]),
        by_size=by_size,
        by_class={
            name: (_mean(whole_trk[..., place]), _mean(whole_trk[0, :, place]))
            for place, name in enumerate(names)
        },
    )


def _mean(values: NDArray[np.float64]) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else 0.0


def _coco_index(
    shapes: Sequence[GroundTruthShape], classes: dict[str, int], as_masks: bool, is_class_agnostic: bool
) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "info": {},
        "images": [
            {"id": image, "width": _CANVAS, "height": _CANVAS} for image in {item.image for item in shapes}
        ],
        "categories": [{"id": number, "name": name} for name, number in classes.items()],
        "annotations": [
            _annotation(number, item, classes[_class_of(item, is_class_agnostic)], as_masks)
            for number, item in enumerate(shapes, start=1)
        ],
    }
    index.createIndex()
    return index


def _class_of(item: GroundTruthShape, is_class_agnostic: bool) -> str:
    return ANY_CLASS if is_class_agnostic else item.desc


def _annotation(number: int, item: GroundTruthShape, category: int, as_masks: bool) -> dict[str, Any]:
    x, y = item.bins[0::2], item.bins[1::2]
    width, height = max(x) - min(x), max(y) - min(y)
    annotation: dict[str, Any] = {
        "id": number,
        "image_id": item.image,
        "category_id": category,
        "iscrowd": 0,
        "bbox": [min(x), min(y), width, height],
        "area": _area(item) * item.image_pixels / (_CANVAS - 1) ** 2,
    }
    if as_masks:
        outline = item.bins if item.is_polygon else (x[0], y[0], x[1], y[0], x[1], y[1], x[0], y[1])
        annotation["segmentation"] = [[float(value) for value in outline]]
    if isinstance(item, Detection):
        annotation["score"] = item.score
    return annotation


def _area(item: GroundTruthShape) -> float:
    """Return the area in bins, squared: of a polygon by the sum over its edges."""
    x, y = np.asarray(item.bins[0::2], float), np.asarray(item.bins[1::2], float)
    if not item.is_polygon:
        return float((x[1] - x[0]) * (y[1] - y[0]))
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
