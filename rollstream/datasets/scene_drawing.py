"""Draws one scene of handwritten digits and says where they are.

Pure: everything random comes from the generator passed in. Paper scenes are labelled with boxes, chalkboard
scenes with polygons, so that the geometry to write can be seen in the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import bin_from_pixels
from broker_schemas.method.polygon import canonical_polygon
from broker_schemas.records.records import GroundTruthObject
from rollstream.datasets.digit_outline import DIGIT_NAMES, MASK_SIDE, DigitShape, FloatArray

MAX_TRIES: Final = 60
MAX_SHARED: Final = 0.08


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What scenes look like; sides in pixels, ``polygon_share`` of scenes are chalkboards."""

    image_side_pixels: int = 128
    smallest_digit_pixels: int = 24
    largest_digit_pixels: int = 56
    max_digits: int = 3
    polygon_share: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn scene: ``pixels`` (side, side, 3) uint8 and the objects in it, in drawing order."""

    pixels: NDArray[np.uint8]
    objects: tuple[GroundTruthObject, ...]


@dataclass(frozen=True, kw_only=True)
class _Placement:
    shape: DigitShape
    scale: float
    left: float
    top: float

    def to_scene(self, points: FloatArray) -> FloatArray:
        """Return (V, 2) points of the mask as points of the scene, both at pixel centres."""
        corner = np.array([self.left, self.top])
        return np.asarray((points + 0.5) * self.scale + corner - 0.5, dtype=np.float64)

    @property
    def box_xyxy(self) -> FloatArray:
        corners: FloatArray = self.to_scene(self.shape.box_xyxy.reshape(2, 2))
        return corners.reshape(4)


def draw_scene(
    shapes: Sequence[DigitShape], settings: SceneSettings, generator: np.random.Generator
) -> Scene:
    """Return a scene of one to ``max_digits`` digits out of ``shapes``, which barely overlap.

    Every object lies inside the image. Equal arguments (and generator state) give an equal scene.
    """
    is_chalkboard = bool(generator.random() < settings.polygon_share)
    suited = [shape for shape in shapes if shape.is_whole] if is_chalkboard else list(shapes)
    placements = _place_digits(suited, settings, generator)
    pixels = _background(settings.image_side_pixels, is_chalkboard, generator)
    for placement in placements:
        pixels = _ink_over(pixels, placement, is_chalkboard, generator)
    noise = generator.normal(0.0, 3.0, size=pixels.shape)
    side = settings.image_side_pixels
    label = polygon_label if is_chalkboard else box_label
    return Scene(
        pixels=np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8),
        objects=tuple(label(placement, side) for placement in placements),
    )


def box_label(placement: _Placement, side_pixels: int) -> GroundTruthObject:
    """Return the box of a placed digit in bins, between pixels and so finer than them."""
    bins = tuple(bin_from_pixels(float(value), side_pixels) for value in placement.box_xyxy)
    return GroundTruthObject(desc=DIGIT_NAMES[placement.shape.digit], geometry="bbox_2d", bins=bins)


def polygon_label(placement: _Placement, side_pixels: int) -> GroundTruthObject:
    """Return the canonical outline of a placed digit in bins."""
    outline = placement.to_scene(placement.shape.outline)
    bins = canonical_polygon([bin_from_pixels(float(value), side_pixels) for value in outline.reshape(-1)])
    return GroundTruthObject(desc=DIGIT_NAMES[placement.shape.digit], geometry="poly", bins=bins)


def _place_digits(
    shapes: Sequence[DigitShape], settings: SceneSettings, generator: np.random.Generator
) -> list[_Placement]:
    wanted = int(generator.integers(1, settings.max_digits + 1))
    placed: list[_Placement] = []
    for _ in range(MAX_TRIES):
        if len(placed) == wanted:
            break
        candidate = _random_placement(shapes, settings, generator)
        if all(_shared_area(candidate.box_xyxy, other.box_xyxy) <= MAX_SHARED for other in placed):
            placed.append(candidate)
    return placed


def _random_placement(
    shapes: Sequence[DigitShape], settings: SceneSettings, generator: np.random.Generator
) -> _Placement:
    shape = shapes[int(generator.integers(len(shapes)))]
    digit_pixels = generator.uniform(settings.smallest_digit_pixels, settings.largest_digit_pixels)
    room = settings.image_side_pixels - digit_pixels
    return _Placement(
        shape=shape,
        scale=float(digit_pixels / MASK_SIDE),
        left=float(generator.uniform(0, room)),
        top=float(generator.uniform(0, room)),
    )


def _shared_area(box_xyxy: FloatArray, other_xyxy: FloatArray) -> float:
    """Return the intersection as a share of the smaller box."""
    overlap = np.minimum(box_xyxy[2:], other_xyxy[2:]) - np.maximum(box_xyxy[:2], other_xyxy[:2])
    smaller = min(float(np.prod(box[2:] - box[:2])) for box in (box_xyxy, other_xyxy))
    return float(np.prod(np.maximum(overlap, 0.0))) / smaller


def _background(side_pixels: int, is_chalkboard: bool, generator: np.random.Generator) -> FloatArray:
    low, high = (35.0, 75.0) if is_chalkboard else (205.0, 245.0)
    base = generator.uniform(low, high) + generator.uniform(-10.0, 10.0, size=3)
    across, down = np.meshgrid(np.linspace(-1, 1, side_pixels), np.linspace(-1, 1, side_pixels))
    angle, strength = generator.uniform(0, 2 * np.pi), generator.uniform(0, 15)
    slope = strength * (np.cos(angle) * across + np.sin(angle) * down)
    return np.asarray(base[None, None, :] + slope[:, :, None], dtype=np.float64)


def _ink_over(
    pixels: FloatArray, placement: _Placement, is_chalkboard: bool, generator: np.random.Generator
) -> FloatArray:
    from PIL import Image

    side = pixels.shape[0]
    low, high = (195.0, 245.0) if is_chalkboard else (15.0, 90.0)
    colour = generator.uniform(low, high) + generator.uniform(-10.0, 10.0, size=3)
    inverse = 1.0 / placement.scale
    mask = Image.fromarray(placement.shape.ink.astype(np.float32)).transform(
        (side, side),
        Image.Transform.AFFINE,
        (inverse, 0.0, -placement.left * inverse, 0.0, inverse, -placement.top * inverse),
        resample=Image.Resampling.BILINEAR,
    )
    cover = np.clip(np.asarray(mask, dtype=np.float64), 0.0, 1.0)[:, :, None]
    return np.asarray(pixels * (1.0 - cover) + colour[None, None, :] * cover, dtype=np.float64)
