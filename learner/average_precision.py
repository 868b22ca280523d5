"""COCO average precision by pycocotools, on shapes in bins.

Bins stretch an image to a square, which leaves every IoU as it is. Where a polygon takes part all shapes are
compared as masks, else as boxes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from broker_schemas.method.coordinates import NUM_BINS

_CANVAS: Final = NUM_BINS
ANY_CLASS: Final = "object"


@dataclass(frozen=True, kw_only=True)
class GroundTruthShape:
    """A labelled shape: ``image`` (any number that names it), its ``desc`` as class, and its ``bins``."""

    image: int
    desc: str
    bins: tuple[int, ...]
    is_polygon: bool


@dataclass(frozen=True, kw_only=True)
class Detection(GroundTruthShape):
    """A predicted shape with its ``score``; higher comes first."""

    score: float


def mean_average_precision(
    truth: Sequence[GroundTruthShape],
    detections: Sequence[Detection],
    *,
    iou_thresholds: Sequence[float] | None = None,
    is_class_agnostic: bool = False,
) -> float:
    """Return AP over classes and IoU 0.5 to 0.95 (or ``iou_thresholds``); 0 without truth or detections.

    Classes are the ``desc`` of the truth; a detection of another class counts nowhere, as COCO has it, unless
    ``is_class_agnostic``. At most 100 detections an image and class count.
    """
    from pycocotools.cocoeval import COCOeval

    names = sorted({_class_of(item, is_class_agnostic) for item in truth})
    classes = {name: number for number, name in enumerate(names, start=1)}
    known = [item for item in detections if _class_of(item, is_class_agnostic) in classes]
    if not truth or not known:
        return 0.0
    as_masks = any(item.is_polygon for item in [*truth, *known])
    # pycocotools tells its progress on stdout, which belongs to the command
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = _coco_index(truth, classes, as_masks, is_class_agnostic)
        found = _coco_index(known, classes, as_masks, is_class_agnostic)
        evaluation = COCOeval(annotated, found, "segm" if as_masks else "bbox")
        evaluation.params.imgIds = sorted({item.image for item in [*truth, *known]})
        if iou_thresholds is not None:
            evaluation.params.iouThrs = np.asarray(iou_thresholds, float)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    measured = precision[precision > -1]
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
        "area": width * height,
    }
    if as_masks:
        outline = item.bins if item.is_polygon else (x[0], y[0], x[1], y[0], x[1], y[1], x[0], y[1])
        annotation["segmentation"] = [[float(value) for value in outline]]
    if isinstance(item, Detection):
        annotation["score"] = item.score
    return annotation
