"""Pixels to bins: one annotated object to one labelled object, or the reason why not. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker_schemas.method.coordinates import bin_from_pixels
from broker_schemas.method.object_fields import FieldProblem, check_desc, check_shape
from broker_schemas.method.polygon import canonical_polygon
from broker_schemas.records.records import GroundTruthObject
from rollstream.datasets.importing.drafts import AnnotationProblem, PixelObject

BORDER_PIXELS: Final = 1.0
SMALLEST_AREA_PIXELS: Final = 1e-6


def convert_object(item: PixelObject, width: int, height: int) -> GroundTruthObject:
    """Return ``item`` in bins of an image of ``width`` x ``height`` pixels.

    A point up to one pixel past the last pixel's centre is on the border (tools that count edges write
    ``width`` there) and clamped. Raises AnnotationProblem for a point farther out, a shape that encloses
    nothing in pixels or in bins, or a label that is not one line.
    """
    try:
        desc = check_desc(item.desc.strip(), "label")
    except FieldProblem as exc:
        raise AnnotationProblem("label", str(exc)) from exc
    _check_bounds(item, width, height)
    bins = tuple(
        bin_from_pixels(value, height if index % 2 else width) for index, value in enumerate(item.points)
    )
    if item.geometry == "bbox_2d":
        return GroundTruthObject(desc=desc, geometry="bbox_2d", bins=_box_bins(item, bins))
    if enclosed_pixels(item.points) < SMALLEST_AREA_PIXELS:
        raise AnnotationProblem("degenerate", "polygon: encloses nothing, expected a shape with an area")
    try:
        polygon = canonical_polygon(bins)
    except ValueError as exc:
        raise AnnotationProblem("degenerate", f"polygon of {len(bins) // 2} points: {exc}") from exc
    check_shape("poly", polygon, "polygon")
    return GroundTruthObject(desc=desc, geometry="poly", bins=polygon)


def enclosed_pixels(points: Sequence[float]) -> float:
    """Return the area in square pixels that a flat polygon encloses; 0 for none."""
    x, y = points[0::2], points[1::2]
    doubled = sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))
    return abs(doubled) / 2


def _box_bins(item: PixelObject, bins: tuple[int, ...]) -> tuple[int, ...]:
    x1, y1, x2, y2 = item.points
    if x2 <= x1 or y2 <= y1:
        raise AnnotationProblem(
            "degenerate",
            f"box: got x {x1:g} to {x2:g} and y {y1:g} to {y2:g} (pixels counted from 0), "
            "expected x1 < x2 and y1 < y2",
        )
    if bins[2] <= bins[0] or bins[3] <= bins[1]:
        raise AnnotationProblem("too small", f"box: got {x2 - x1:g}x{y2 - y1:g} pixels, less than one bin")
    return bins


def _check_bounds(item: PixelObject, width: int, height: int) -> None:
    for values, extent, axis in ((item.points[0::2], width, "x"), (item.points[1::2], height, "y")):
        for value in values:
            if not -BORDER_PIXELS / 2 <= value <= extent - 1 + BORDER_PIXELS:
                raise AnnotationProblem(
                    "out of bounds",
                    f"{axis} {value:g} lies outside 0 to {extent - 1} (pixels counted from 0)",
                )
