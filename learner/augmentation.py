"""Jitter, crop, scale and flip of a labelled image, from a generator passed in.

Pixel centres have whole coordinates, 0 to extent - 1, as in the bins. The image keeps its size, so its patch
grid and prompt stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import LARGEST_BIN, bin_from_pixels, pixels_from_bin
from broker_schemas.method.polygon import canonical_polygon
from broker_schemas.records.records import GroundTruthObject

if TYPE_CHECKING:
    from PIL.Image import Image

FloatPoints = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """What may be done to a ground-truth sample; all off but the jitter.

    ``jitter_pixels``: each coordinate moves by up to this before it is binned; without it bins that fall
    between pixels never occur as input. ``crop_probability``: of cutting the borders, never an object;
    ``crop_fraction``: largest part of a side that a crop takes away. ``shrink_probability``: of scaling the
    image down to ``shrink_smallest`` at least and placing it anywhere on a canvas of its size.
    ``flip_probability``: of a mirror image, only for tasks whose objects may be mirrored (not for writing).
    """

    jitter_pixels: float = 0.5
    crop_probability: float = 0.0
    crop_fraction: float = 0.3
    shrink_probability: float = 0.0
    shrink_smallest: float = 0.7
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_probability", "crop_fraction", "shrink_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: got {name} {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.shrink_smallest <= 1 or self.jitter_pixels < 0:
            raise ValueError(
                f"augmentation: got shrink_smallest {self.shrink_smallest}, jitter_pixels "
                f"{self.jitter_pixels}; expected above 0 to 1, and 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class PixelTransform:
    """What happens to one image of (width, height): crop, scale into a target box, flip; in this order.

    ``crop_xyxy`` and ``target_xyxy`` are edges in whole pixels; the crop is resized to fill the target box
    of a canvas of the original size.
    """

    width: int
    height: int
    crop_xyxy: tuple[int, int, int, int]
    target_xyxy: tuple[int, int, int, int]
    flipped: bool

    @property
    def is_identity(self) -> bool:
        whole = (0, 0, self.width, self.height)
        return self.crop_xyxy == whole and self.target_xyxy == whole and not self.flipped

    def move_points(self, points_xy: FloatPoints) -> FloatPoints:
        """Return pixel coordinates (n, 2) where the transform puts them."""
        crop, target = np.asarray(self.crop_xyxy, float), np.asarray(self.target_xyxy, float)
        factor = (target[2:] - target[:2]) / (crop[2:] - crop[:2])
        moved: FloatPoints = (points_xy + 0.5 - crop[:2]) * factor + target[:2] - 0.5
        if self.flipped:
            moved[:, 0] = self.width - 1 - moved[:, 0]
        return moved

    def move_image(self, image: Image) -> Image:
        """Return the image transformed; what the target box leaves free is its mean colour."""
        from PIL import Image as PillowImage
        from PIL import ImageOps

        if self.is_identity:
            return image
        left, top, right, bottom = self.target_xyxy
        scaled = image.crop(self.crop_xyxy).resize(
            (right - left, bottom - top), PillowImage.Resampling.BILINEAR
        )
        mean_colour = tuple(int(v) for v in np.asarray(image).reshape(-1, 3).mean(axis=0))
        canvas = PillowImage.new("RGB", (self.width, self.height), mean_colour)
        canvas.paste(scaled, (left, top))
        return ImageOps.mirror(canvas) if self.flipped else canvas


def draw_transform(
    width: int,
    height: int,
    objects: Sequence[GroundTruthObject],
    settings: AugmentationSettings,
    rng: np.random.Generator,
) -> PixelTransform:
    """Return a transform that keeps every object whole; every sample takes the same number of draws."""
    uniform = rng.random(12)
    extent = np.array([width, height], float)
    crop = np.array([0.0, 0.0, width, height])
    if uniform[0] < settings.crop_probability:
        low, high = _hull(width, height, objects)
        largest = settings.crop_fraction * extent / 2
        crop[:2] = np.floor(uniform[1:3] * np.minimum(low, largest))
        crop[2:] = extent - np.floor(uniform[3:5] * np.minimum(extent - high, largest))
    target = np.array([0.0, 0.0, width, height])
    if uniform[5] < settings.shrink_probability:
        scale = settings.shrink_smallest + (1 - settings.shrink_smallest) * uniform[6]
        size = np.maximum(np.round(extent * scale), 1)
        target[:2] = np.floor((extent - size) * uniform[7:9])
        target[2:] = target[:2] + size
    return PixelTransform(
        width=width,
        height=height,
        crop_xyxy=_whole(crop),
        target_xyxy=_whole(target),
        flipped=bool(uniform[9] < settings.flip_probability),
    )


def move_object(
    item: GroundTruthObject, transform: PixelTransform, jitter_pixels: float, rng: np.random.Generator
) -> GroundTruthObject:
    """Return ``item`` in the transformed image, each coordinate jittered by up to ``jitter_pixels``, in bins.

    A box keeps at least one bin of width and height; a polygon that the jitter makes degenerate stays
    without it, or as it was.
    """
    points = transform.move_points(_points(item, transform.width, transform.height))
    jitter = rng.uniform(-jitter_pixels, jitter_pixels, points.shape)
    if item.geometry == "bbox_2d":
        bins = _to_bins(points + jitter, transform)
        return GroundTruthObject(desc=item.desc, geometry="bbox_2d", bins=_ordered_box(bins))
    for candidate in (points + jitter, points):
        try:
            polygon = canonical_polygon(_to_bins(candidate, transform))
        except ValueError:
            continue
        return GroundTruthObject(desc=item.desc, geometry="poly", bins=polygon)
    return item


def _points(item: GroundTruthObject, width: int, height: int) -> FloatPoints:
    x = [pixels_from_bin(value, width) for value in item.bins[0::2]]
    y = [pixels_from_bin(value, height) for value in item.bins[1::2]]
    return np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)


def _to_bins(points_xy: FloatPoints, transform: PixelTransform) -> list[int]:
    bins: list[int] = []
    for x, y in points_xy:
        bins += [bin_from_pixels(float(x), transform.width), bin_from_pixels(float(y), transform.height)]
    return bins


def _ordered_box(bins: list[int]) -> tuple[int, int, int, int]:
    (x1, x2), (y1, y2) = sorted(bins[0::2]), sorted(bins[1::2])
    x1, x2 = _at_least_one_bin(x1, x2)
    y1, y2 = _at_least_one_bin(y1, y2)
    return x1, y1, x2, y2


def _at_least_one_bin(low: int, high: int) -> tuple[int, int]:
    if high > low:
        return low, high
    return (low, low + 1) if low < LARGEST_BIN else (low - 1, low)


def _hull(width: int, height: int, objects: Sequence[GroundTruthObject]) -> tuple[FloatPoints, FloatPoints]:
    """Return the outer edges (low, high) around all objects in pixels; the centre point for none."""
    if not objects:
        centre = np.array([width / 2, height / 2])
        return centre, centre
    points = np.concatenate([_points(item, width, height) for item in objects])
    extent = np.array([width, height], float)
    return np.maximum(np.floor(points.min(axis=0)), 0), np.minimum(np.ceil(points.max(axis=0)) + 1, extent)


def _whole(box: FloatPoints) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(value) for value in box)
    return left, top, right, bottom
