"""What a reader hands over: images with objects in pixels, before anything is checked against the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from rollstream.datasets.importing.report import ImportProblem

VALIDATION_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class PixelObject:
    """One annotated object; ``item`` names it in reports.

    ``points`` are flat pixel coordinates counted from 0: (x1, y1, x2, y2) of a box, or a polygon's vertices.
    """

    item: str
    desc: str
    geometry: Literal["bbox_2d", "poly"]
    points: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PixelImage:
    """One annotated image of ``split``; ``annotation`` names its file in reports.

    ``target_path`` is where the image goes, relative to the new folder's ``images``. ``size`` is (width,
    height) as annotated, None where the annotation does not say. ``num_broken`` objects are left out already.
    """

    split: str
    annotation: str
    image_file: Path
    target_path: str
    sample_id: str
    size: tuple[int, int] | None
    objects: tuple[PixelObject, ...]
    num_broken: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceContent:
    """Everything a reader found: readable images, and what could not be read.

    ``num_images_unreadable`` counts images without a PixelImage.
    """

    images: tuple[PixelImage, ...]
    problems: tuple[ImportProblem, ...]
    num_images_unreadable: int = 0


class AnnotationProblem(ValueError):
    """One object or file that cannot be read as annotated; ``kind`` groups it in the summary."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def seeded_split(names: Sequence[str], seed: int) -> dict[str, str]:
    """Return ``train`` or ``val`` for each name; depends on the set of names and ``seed`` alone.

    A tenth goes to ``val``, at least one; a single name goes to ``train``.
    """
    shuffled = sorted(set(names))
    Random(seed).shuffle(shuffled)
    num_val = max(1, round(VALIDATION_SHARE * len(shuffled))) if len(shuffled) > 1 else 0
    return {name: "val" if index < num_val else "train" for index, name in enumerate(shuffled)}


def annotation_number(value: object, name: str) -> float:
    """Return ``value`` (a number, or text of one) as a finite float; raises AnnotationProblem."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError) as exc:
        raise AnnotationProblem("no number", f"{name}: got {value!r:.40}, expected a number") from exc
    if not abs(number) < 1e9:
        raise AnnotationProblem("no number", f"{name}: got {number}, expected a finite pixel coordinate")
    return number
