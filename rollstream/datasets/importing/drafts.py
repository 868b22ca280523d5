"""What a reader is told and hands over: images with objects in pixels, before anything is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollstream.datasets.importing.report import ImportProblem

MaskMode = Literal["outline", "hull", "box"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the command line says to a reader.

    ``val_share`` and ``seed`` split what the source does not split itself, or all of it with ``is_resplit``;
    ``group_by`` keeps the images of one folder together. ``masks``: what a mask, or an object of several
    parts, becomes. ``base``: VOC counts pixels from 0 or 1, None finds out. ``coordinates``: grounding lines
    hold pixels or 0 to 1000, None finds out.
    """

    seed: int = 0
    val_share: float = 0.1
    is_resplit: bool = False
    group_by: Literal["file", "folder"] = "file"
    masks: MaskMode = "outline"
    base: Literal[0, 1] | None = None
    coordinates: Literal["pixels", "thousandths"] | None = None


@dataclass(frozen=True, kw_only=True)
class PixelObject:
    """One annotated object; ``item`` names it in reports.

    ``points`` are flat pixel coordinates counted from 0: (x1, y1, x2, y2) of a box, or a polygon's vertices.
    ``conversion`` says what it was made from where the annotation holds another kind of shape.
    """

    item: str
    desc: str
    geometry: Literal["bbox_2d", "poly"]
    points: tuple[float, ...]
    conversion: str = ""


@dataclass(frozen=True, kw_only=True)
class PixelImage:
    """One annotated image of ``split``; ``annotation`` names its file in reports.

    ``picture`` is its file, or its bytes where the annotation holds them. ``target_path`` is where the image
    goes, relative to the new folder's ``images``. ``size`` is (width, height) as annotated, None where the
    annotation does not say. ``num_broken`` objects are left out already. ``is_normalised``: points are
    shares of width and height, not pixels. ``are_pixel_centres``: the last pixel of a row is width - 1, not
    width.
    """

    split: str
    annotation: str
    picture: Path | bytes
    target_path: str
    sample_id: str
    size: tuple[int, int] | None
    objects: tuple[PixelObject, ...]
    num_broken: int = 0
    is_normalised: bool = False
    are_pixel_centres: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceContent:
    """Everything a reader found: readable images, and what could not be read.

    ``num_images_unreadable`` counts images without a PixelImage and ``num_objects_unreadable`` the objects
    on them. ``notes`` say what the reader decided by looking.
    """

    images: tuple[PixelImage, ...]
    problems: tuple[ImportProblem, ...]
    num_images_unreadable: int = 0
    num_objects_unreadable: int = 0
    notes: tuple[str, ...] = ()


class AnnotationProblem(ValueError):
    """One object or file that cannot be read as annotated; ``kind`` groups it in the summary.

    ``num_objects`` are lost with it where it takes a whole image.
    """

    def __init__(self, kind: str, reason: str, num_objects: int = 0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.num_objects = num_objects


def annotation_number(value: object, name: str) -> float:
    """Return ``value`` (a number, or text of one) as a finite float; raises AnnotationProblem."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise AnnotationProblem("no number", f"{name}: got {value!r:.40}, expected a number") from exc
    if not abs(number) < 1e9:
        raise AnnotationProblem("no number", f"{name}: got {number}, expected a finite pixel coordinate")
    return number


def stated_size(width: object, height: object) -> tuple[int, int] | None:
    """Return a size that an annotation states as whole positive numbers (also as text); None for another."""
    try:
        sides = [float(str(side).strip()) for side in (width, height)]
    except ValueError:
        return None
    if not all(side >= 1 and side == int(side) for side in sides if side < 1e9) or max(sides) >= 1e9:
        return None
    return int(sides[0]), int(sides[1])
