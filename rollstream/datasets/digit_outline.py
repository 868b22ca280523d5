"""The outline of a scanned digit: from an 8x8 scan to a smooth ink mask, its extent and a short polygon.

Pure. Coordinates are those of pixel centres: the first pixel of a row lies at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
DIGIT_NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MASK_SIDE: Final = 64
INK_LEVEL: Final = 0.4
SMALLEST_PART: Final = 0.02
TOLERANCE: Final = 0.5
_MARGIN: Final = 1


@dataclass(frozen=True, kw_only=True)
class DigitShape:
    """One scan, smoothly enlarged.

    ``ink`` (64, 64) float in 0..1. ``box_xyxy`` (4,) encloses every part of the ink; ``outline`` (V, 2)
    follows the largest part as (x, y) vertices, not closed. ``is_whole``: it reaches as far as the box.
    """

    digit: int
    ink: FloatArray
    box_xyxy: FloatArray
    outline: FloatArray
    is_whole: bool


def digit_shape(scan: NDArray[Any], digit: int, max_vertices: int = 8) -> DigitShape:
    """Return the shape of ``scan``, an (8, 8) array of ink from 0 to 16; raises ValueError without ink."""
    from PIL import Image

    small = Image.fromarray(np.asarray(scan, dtype=np.float32) / 16.0)
    enlarged = small.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BICUBIC)
    ink = np.clip(np.asarray(enlarged, dtype=np.float64), 0.0, 1.0)
    parts = ink_contours(ink)
    if not parts:
        raise ValueError(f"got a scan of digit {digit} whose ink stays under {INK_LEVEL}, expected some ink")
    corners = np.concatenate(parts)
    box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
    reach = np.concatenate([parts[0].min(axis=0), parts[0].max(axis=0)])
    return DigitShape(
        digit=digit,
        ink=ink,
        box_xyxy=box,
        outline=simplify_outline(parts[0], max_vertices),
        is_whole=bool(np.abs(box - reach).max() < 0.05 * MASK_SIDE),
    )


def ink_contours(ink: FloatArray) -> list[FloatArray]:
    """Return the closed contours of ``ink`` at INK_LEVEL, largest area first, without specks.

    Each is (V, 2) of (x, y), not closed. Ink that touches the border is closed along it. Empty for no ink.
    """
    from contourpy import contour_generator

    padded = np.pad(ink, _MARGIN)
    lines = contour_generator(z=padded).lines(INK_LEVEL)
    contours = [np.asarray(line, dtype=np.float64)[:-1] - _MARGIN for line in lines]
    smallest = SMALLEST_PART * ink.size
    sized = [(area, contour) for contour in contours if (area := enclosed_area(contour)) >= smallest]
    return [contour for _, contour in sorted(sized, key=lambda pair: -pair[0])]


def enclosed_area(vertices: FloatArray) -> float:
    """Return the area that the closed polygon ``vertices`` (V, 2) encloses."""
    x, y = vertices[:, 0], vertices[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def simplify_outline(vertices: FloatArray, max_vertices: int) -> FloatArray:
    """Return at most ``max_vertices`` of ``vertices`` (V, 2), in order, those that shape the outline most.

    Douglas and Peucker, worst chord first: it begins with the top-most vertex and the one farthest from it,
    and stops early once no vertex lies half a pixel off. Raises ValueError under three vertices asked.
    """
    if max_vertices < 3:
        raise ValueError(f"got max_vertices {max_vertices}, expected at least 3")
    start = int(np.lexsort((vertices[:, 0], vertices[:, 1]))[0])
    ring = np.roll(vertices, -start, axis=0)
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.argmax(np.linalg.norm(ring - ring[0], axis=1)))
    kept = [0, far]
    chords = [_worst_vertex(closed, 0, far), _worst_vertex(closed, far, len(ring))]
    while len(kept) < max_vertices:
        offset, middle, first, last = max(chords)
        if offset <= TOLERANCE:
            break
        kept.append(middle)
        chords.remove((offset, middle, first, last))
        chords += [_worst_vertex(closed, first, middle), _worst_vertex(closed, middle, last)]
    return np.asarray(ring[sorted(kept)], dtype=np.float64)


def _worst_vertex(points: FloatArray, first: int, last: int) -> tuple[float, int, int, int]:
    """Return (distance, index, first, last) of the vertex farthest from the chord; distance 0 if none."""
    if last - first < 2:
        return 0.0, first, first, last
    chord = points[last] - points[first]
    length = float(np.linalg.norm(chord))
    offsets = points[first + 1 : last] - points[first]
    if length == 0:
        distances = np.linalg.norm(offsets, axis=1)
    else:
        distances = np.abs(chord[0] * offsets[:, 1] - chord[1] * offsets[:, 0]) / length
    farthest = int(np.argmax(distances))
    return float(distances[farthest]), first + 1 + farthest, first, last
