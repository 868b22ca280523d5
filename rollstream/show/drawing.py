"""Draws boxes and polygons on an image: what was labelled and what the model wrote, in two colours.

Pure: images and shapes in, a new image out. It knows no files and no records beyond the shape itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from PIL import Image, ImageDraw, ImageFont

from broker_schemas.method.coordinates import LARGEST_BIN, pixels_from_bin
from rollstream.show.visible_text import one_line

Point = tuple[float, float]
Colour = tuple[int, int, int]

GROUND_TRUTH_COLOUR: Final[Colour] = (0, 196, 154)
PREDICTION_COLOUR: Final[Colour] = (255, 122, 26)
_DARK: Final[Colour] = (10, 14, 20)
_LABEL_CHARS: Final = 24
_SMOOTHING: Final = 2
_LARGEST_BIN_WRITTEN: Final = 1e9
_LARGEST_NUM_LABELLED: Final = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape in bins 0..999: a box (x1, y1, x2, y2) or a polygon of flat (x, y) pairs, and its label."""

    label: str
    geometry: Literal["bbox_2d", "poly"]
    bins: tuple[float, ...]

    @classmethod
    def from_map(cls, item: Mapping[str, Any]) -> Shape | None:
        """Return the shape of ``{desc, bbox_2d | poly}``; None when it cannot be drawn.

        Polygons may be flat or pairs. A map without a geometry, of the wrong length, or with anything but
        finite numbers gives None, because an evaluation file also lists what a model wrote wrongly.
        """
        label = str(item.get("desc", ""))
        for geometry in ("bbox_2d", "poly"):
            if geometry in item:
                bins = _flat_numbers(item[geometry])
                fits = len(bins) == 4 if geometry == "bbox_2d" else len(bins) >= 6 and len(bins) % 2 == 0
                return cls(label=label, geometry=geometry, bins=bins) if fits else None
        return None

    def corner_points(self) -> tuple[Point, ...]:
        """Return the closed outline's points in bins."""
        if self.geometry == "bbox_2d":
            x1, y1, x2, y2 = self.bins
            return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
        return tuple(zip(self.bins[0::2], self.bins[1::2], strict=True))


def draw_shapes(
    image: Image.Image,
    *,
    ground_truth: Sequence[Shape] = (),
    predictions: Sequence[Shape] = (),
    smallest_side_px: int = 384,
    largest_side_px: int = 1024,
) -> Image.Image:
    """Return a new RGB image with both layers drawn in; the given image stays as it is.

    Small images grow by a whole factor (pixels stay sharp) until the longer side has ``smallest_side_px``,
    large ones shrink to ``largest_side_px``. Ground truth is solid, predictions are dashed on top, so that an
    exact hit shows both. No shapes: the scaled image alone.
    """
    scale = scale_for(image.size, smallest_side_px=smallest_side_px, largest_side_px=largest_side_px)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    canvas = image.convert("RGB").resize(size, resampling)
    if not ground_truth and not predictions:
        return canvas
    layers = ((ground_truth, GROUND_TRUTH_COLOUR, False), (predictions, PREDICTION_COLOUR, True))
    # Pillow draws without smoothing: a larger sheet is drawn and shrunk, bounded by largest_side_px.
    sheet = Image.new("RGBA", (size[0] * _SMOOTHING, size[1] * _SMOOTHING), (*_DARK, 0))
    _draw_layers(sheet, layers, lambda point: to_canvas(point, image.size, scale * _SMOOTHING))
    shrunk = sheet.resize(size, Image.Resampling.BOX)
    return Image.composite(shrunk.convert("RGB"), canvas, shrunk.getchannel("A"))


def scale_for(size: tuple[int, int], *, smallest_side_px: int, largest_side_px: int) -> float:
    """Return the factor from stored to drawn pixels: a whole number when growing, below 1 when shrinking."""
    longest = max(size)
    if longest > largest_side_px:
        return largest_side_px / longest
    return float(max(1, math.ceil(smallest_side_px / longest)))


def to_canvas(point: Point, size: tuple[int, int], scale: float) -> Point:
    """Return canvas pixels of a point in bins: k/999·(extent-1), the centre of that pixel, scaled."""
    x, y = (
        (pixels_from_bin(min(max(value, 0.0), float(LARGEST_BIN)), extent) + 0.5) * scale - 0.5
        for value, extent in zip(point, size, strict=True)
    )
    return (x, y)


def _draw_layers(
    sheet: Image.Image,
    layers: Sequence[tuple[Sequence[Shape], Colour, bool]],
    to_sheet: Callable[[Point], Point],
) -> None:
    """Draw all outlines, then all labels over them; no labels where there are too many to be read."""
    pen = ImageDraw.Draw(sheet)
    longest = max(sheet.size)
    width_px = max(2 * _SMOOTHING, round(longest / 170))
    placed = [
        (shape, [to_sheet(point) for point in shape.corner_points()], colour, dashed)
        for shapes, colour, dashed in layers
        for shape in shapes
    ]
    for _, points, colour, dashed in placed:
        _draw_outline(pen, points, colour, width_px, dashed=dashed)
    if len(placed) > _LARGEST_NUM_LABELLED:
        return
    font = ImageFont.load_default(size=max(11 * _SMOOTHING, round(longest / 34)))
    taken: list[tuple[float, float, float, float]] = []
    for shape, points, colour, dashed in placed:
        if shape.label:
            _draw_label(pen, shape.label, points, colour, font, sheet.size, taken, below=dashed)


def _draw_outline(
    pen: ImageDraw.ImageDraw, points: Sequence[Point], colour: Colour, width_px: int, *, dashed: bool
) -> None:
    closed = [*points, points[0]]
    edges = list(zip(closed, closed[1:], strict=False))
    pieces = edges if not dashed else [p for edge in edges for p in _dashes(*edge, dash_px=4.0 * width_px)]
    for fill, width in ((_DARK, width_px + _SMOOTHING * 2), (colour, width_px)):
        for piece in pieces:
            pen.line(piece, fill=fill, width=width)
            for x, y in piece if not dashed else ():
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)


def _dashes(start: Point, end: Point, *, dash_px: float) -> list[tuple[Point, Point]]:
    """Return the drawn pieces of a dashed line: an odd number of equal parts, both corners drawn."""
    length = math.dist(start, end)
    num_parts = max(1, round(length / dash_px)) | 1
    ends = [
        (
            start[0] + (end[0] - start[0]) * part / num_parts,
            start[1] + (end[1] - start[1]) * part / num_parts,
        )
        for part in range(num_parts + 1)
    ]
    return [(ends[part], ends[part + 1]) for part in range(0, num_parts, 2)]


def _draw_label(
    pen: ImageDraw.ImageDraw,
    label: str,
    points: Sequence[Point],
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
    *,
    below: bool,
) -> None:
    """Write a label outside its shape, above or below, moved into the picture and off other labels."""
    text = one_line(label, _LABEL_CHARS)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6 * _SMOOTHING, bottom - top + 6 * _SMOOTHING
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = min(max(min(xs), 0), max(size[0] - width, 0))
    under, over = max(ys) + 3 * _SMOOTHING, min(ys) - height - 3 * _SMOOTHING
    candidates = [under, over] if below else [over, under]
    candidates += [under + height, min(ys) + 3 * _SMOOTHING]
    boxes = [
        (x, clamped, x + width, clamped + height)
        for clamped in (min(max(y, 0), max(size[1] - height, 0)) for y in candidates)
    ]
    box = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), boxes[0])
    taken.append(box)
    pen.rectangle(box, fill=colour)
    pen.text((box[0] + 3 * _SMOOTHING - left, box[1] + 3 * _SMOOTHING - top), text, fill=_DARK, font=font)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _flat_numbers(value: object) -> tuple[float, ...]:
    """Return numbers of a flat list or a list of pairs; empty when anything else is in it."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return ()
    flat: list[object] = []
    for item in value:
        flat.extend(item if isinstance(item, list | tuple) else [item])
    if not all(isinstance(item, int | float) and abs(item) <= _LARGEST_BIN_WRITTEN for item in flat):
        return ()
    return tuple(float(item) for item in flat if isinstance(item, int | float))
