"""Pixels to bins: one annotated object to one labelled object, or the reason why not. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from broker_schemas.method.coordinates import LARGEST_BIN, bin_from_pixels
from broker_schemas.method.object_fields import FieldProblem, check_desc, check_shape
from broker_schemas.method.polygon import canonical_polygon
from broker_schemas.records.records import GroundTruthObject
from rollstream.datasets.importing.drafts import AnnotationProblem, PixelObject
from rollstream.datasets.importing.masks import polygon_part
from rollstream.datasets.importing.polygons import clip_polygon, signed_area, simplify_polygon

BORDER_PIXELS: Final = 1.0
SMALLEST_AREA_PIXELS: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One object in bins and what was done to it: ``clipped``, ``widened``, ``simplified``, a conversion."""

    item: GroundTruthObject
    changes: tuple[str, ...] = ()


def convert_object(item: PixelObject, width: int, height: int, simplify_bins: float = 0.0) -> Converted:
    """Return ``item`` in bins of an image of ``width`` x ``height`` pixels.

    A point up to one pixel past the last pixel's centre is on the border (tools that count edges write
    ``width`` there) and clamped; what lies farther out is cut off and said. A shape thinner than one bin is
    widened to one. A polygon loses the vertices that move it by less than ``simplify_bins``.
    Raises AnnotationProblem for a shape wholly outside, one that encloses nothing in pixels, or a label that
    is not one line.
    """
    try:
        desc = check_desc(item.desc.strip(), "label")
    except FieldProblem as exc:
        raise AnnotationProblem("label", str(exc)) from exc
    changes = [item.conversion] if item.conversion else []
    if item.geometry == "bbox_2d":
        _check_box(item.points)
    elif enclosed_pixels(item.points) < SMALLEST_AREA_PIXELS:
        raise AnnotationProblem("degenerate", "polygon: encloses nothing, expected a shape with an area")
    points = item.points
    if _overshoots(points, width, height):
        points = _clip(item, width, height)
        changes.append("clipped")
    if item.geometry == "bbox_2d":
        return _box(desc, points, (width, height), changes)
    return _polygon(desc, points, (width, height), changes, simplify_bins)


def enclosed_pixels(points: Sequence[float]) -> float:
    """Return the area in square pixels that a flat polygon encloses; 0 for none."""
    return abs(signed_area(polygon_part(points)))


def _check_box(points: Sequence[float]) -> None:
    x1, y1, x2, y2 = points
    if x2 <= x1 or y2 <= y1:
        raise AnnotationProblem(
            "degenerate",
            f"box: got x {x1:g} to {x2:g} and y {y1:g} to {y2:g} (pixels counted from 0), "
            "expected x1 < x2 and y1 < y2",
        )


def _overshoots(points: Sequence[float], width: int, height: int) -> bool:
    return any(
        not -BORDER_PIXELS / 2 <= value <= extent - 1 + BORDER_PIXELS
        for values, extent in ((points[0::2], width), (points[1::2], height))
        for value in values
    )


def _clip(item: PixelObject, width: int, height: int) -> tuple[float, ...]:
    """Return the part of ``item`` inside the frame, whose last pixel ends one after its centre."""
    if item.geometry == "bbox_2d":
        x1, y1, x2, y2 = item.points
        clipped: tuple[float, ...] = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
        is_gone = clipped[2] <= clipped[0] or clipped[3] <= clipped[1]
    else:
        part = clip_polygon(polygon_part(item.points), width, height)
        clipped = tuple(float(value) for value in part.reshape(-1))
        is_gone = len(part) < 3 or enclosed_pixels(clipped) < SMALLEST_AREA_PIXELS
    if is_gone:
        x, y = item.points[0::2], item.points[1::2]
        raise AnnotationProblem(
            "out of bounds",
            f"x {min(x):g} to {max(x):g} and y {min(y):g} to {max(y):g} lie outside 0 to {width - 1} and "
            f"0 to {height - 1} (pixels counted from 0)",
        )
    return clipped


def _box(desc: str, points: Sequence[float], size: tuple[int, int], changes: list[str]) -> Converted:
    bins = _bins(points, size)
    wide = _widened(bins)
    if wide != bins:
        changes.append("widened")
    return Converted(item=GroundTruthObject(desc=desc, geometry="bbox_2d", bins=wide), changes=tuple(changes))


def _bins(points: Sequence[float], size: tuple[int, int]) -> tuple[int, ...]:
    return tuple(bin_from_pixels(value, size[index % 2]) for index, value in enumerate(points))


def _widened(bins: tuple[int, ...]) -> tuple[int, ...]:
    """Return a box of at least one bin each way, grown towards the inside of the frame."""
    x1, y1, x2, y2 = bins
    x1, y1 = min(x1, LARGEST_BIN - 1), min(y1, LARGEST_BIN - 1)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _polygon(
    desc: str,
    points: Sequence[float],
    size: tuple[int, int],
    changes: list[str],
    simplify_bins: float,
) -> Converted:
    bins = _bins(points, size)
    try:
        polygon = canonical_polygon(bins)
    except ValueError:
        # an area in pixels and none in bins: thinner than one bin
        x, y = bins[0::2], bins[1::2]
        box = _widened((min(x), min(y), max(x), max(y)))
        return Converted(
            item=GroundTruthObject(desc=desc, geometry="bbox_2d", bins=box),
            changes=(*changes, "polygon thinner than a bin to its box"),
        )
    simple = simplify_polygon(polygon_part(polygon), simplify_bins)
    if len(simple) < len(polygon) // 2:
        try:
            polygon = canonical_polygon([int(value) for value in simple.reshape(-1)])
            changes.append("simplified")
        except ValueError:
            pass  # it would lose its area: it stays whole
    check_shape("poly", polygon, "polygon")
    return Converted(item=GroundTruthObject(desc=desc, geometry="poly", bins=polygon), changes=tuple(changes))
