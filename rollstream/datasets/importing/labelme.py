"""Reads labelme: one JSON an image, with polygons, rectangles, circles and masks in pixels."""

from __future__ import annotations

import base64
import binascii
import json
import math
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from broker_schemas.errors import DataError
from broker_schemas.method.images import confine_image_path
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    MaskMode,
    PixelImage,
    PixelObject,
    ReadOptions,
    SourceContent,
    annotation_number,
    stated_size,
)
from rollstream.datasets.importing.masks import bitmap_parts, shape_of_parts
from rollstream.datasets.importing.picture_index import tidy_path
from rollstream.datasets.importing.report import ImportProblem
from rollstream.datasets.importing.splits import choose_splits, folder_split

CIRCLE_VERTICES: Final = 24
_SUFFIX_BY_FORMAT: Final = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp"}


def read_labelme(source: Path, options: ReadOptions) -> SourceContent:
    """Return the content of every labelme JSON under ``source``, in path order.

    Folders named after splits decide, else ``options``. Raises
    DataError where no file under ``source`` is labelme's.
    """
    loaded = [(file, _load(file)) for file in sorted(source.rglob("*.json"))]
    files = [
        (file, content) for file, content in loaded if not isinstance(content, dict) or "shapes" in content
    ]
    if not any(isinstance(content, dict) for _, content in files):
        raise DataError(f"{source}: no labelme file (*.json with shapes) in it; check the path")
    paths = {file: PurePosixPath(file.relative_to(source).as_posix()) for file, _ in files}
    names = {file: path.with_suffix("").as_posix() for file, path in paths.items()}
    split = choose_splits({names[file]: folder_split(paths[file]) for file, _ in files}, options)
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    num_lost_objects = 0
    for file, content in files:
        try:
            image, found = _read_annotation(
                source, file, content, split[names[file]], names[file], options.masks
            )
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item="image", kind=exc.kind, reason=str(exc)))
            num_lost_objects += exc.num_objects
            continue
        images.append(image)
        problems.extend(found)
    return SourceContent(
        images=tuple(images),
        problems=tuple(problems),
        num_images_unreadable=len(files) - len(images),
        num_objects_unreadable=num_lost_objects,
    )


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        return exc


def _read_annotation(
    source: Path, file: Path, content: Any, split: str, name: str, masks: MaskMode
) -> tuple[PixelImage, list[ImportProblem]]:
    if not isinstance(content, dict) or not isinstance(content["shapes"], list):
        raise AnnotationProblem("unreadable annotation", f"not readable as labelme JSON ({content!r:.120})")
    shapes = content["shapes"]
    try:
        picture, suffix = _picture(source, file, content)
    except AnnotationProblem as exc:
        raise AnnotationProblem(exc.kind, str(exc), num_objects=len(shapes)) from exc
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for number, shape in enumerate(shapes, start=1):
        label = shape.get("label") if isinstance(shape, dict) else None
        item = f"shape {number} ({label or 'no label'})"
        try:
            objects.append(_read_shape(shape, item, masks))
        except AnnotationProblem as exc:
            problems.append(
                ImportProblem(file=str(file), item=f"{item} of {name}", kind=exc.kind, reason=str(exc))
            )
    image = PixelImage(
        split=split,
        annotation=str(file),
        picture=picture,
        target_path=f"{name}{suffix}",
        sample_id=name,
        size=stated_size(content.get("imageWidth"), content.get("imageHeight")),
        objects=tuple(objects),
        num_broken=len(problems),
    )
    return image, problems


def _picture(source: Path, file: Path, content: dict[str, Any]) -> tuple[Path | bytes, str]:
    """Return the picture's file, or the bytes embedded in the annotation where there is none."""
    embedded = content.get("imageData")
    stated = content.get("imagePath")
    problem: AnnotationProblem
    if isinstance(stated, str) and stated:
        try:
            return _picture_file(source, file, stated)
        except AnnotationProblem as exc:
            problem = exc
    else:
        problem = AnnotationProblem("no image", "imagePath is missing, expected a path relative to the file")
    if not isinstance(embedded, str) or not embedded:
        raise problem
    return _embedded(embedded)


def _picture_file(source: Path, file: Path, stated: str) -> tuple[Path, str]:
    """Return what ``imagePath`` names, else the picture of that name beside the annotation."""
    beside = file.parent / tidy_path(stated).name
    try:
        found = confine_image_path(source, stated.replace("\\", "/"), relative_to=file.parent)
    except DataError as exc:
        if beside.is_file():
            return beside, beside.suffix
        raise AnnotationProblem("image outside", str(exc)) from exc
    if not found.is_file() and beside.is_file():
        found = beside
    if not found.is_file():
        raise AnnotationProblem("no image", f"image {found} does not exist, and imageData is empty")
    return found, found.suffix


def _embedded(text: str) -> tuple[bytes, str]:
    from PIL import Image, UnidentifiedImageError

    try:
        data = base64.b64decode(text.split(",", 1)[1] if text.startswith("data:") else text, validate=True)
        with Image.open(BytesIO(data)) as stored:
            return data, _SUFFIX_BY_FORMAT.get(str(stored.format), ".png")
    except (binascii.Error, OSError, UnidentifiedImageError, SyntaxError, ValueError) as exc:
        raise AnnotationProblem("broken image", f"imageData cannot be read as a picture ({exc})") from exc


def _read_shape(shape: Any, item: str, masks: MaskMode) -> PixelObject:
    if not isinstance(shape, dict) or not isinstance(shape.get("points"), list):
        raise AnnotationProblem("no points", "got no list of points, expected one")
    desc = shape.get("label")
    desc = desc if isinstance(desc, str) else ""
    points = [_read_point(point, index) for index, point in enumerate(shape["points"])]
    kind = shape.get("shape_type") or "polygon"
    if kind == "mask" and len(points) == 2:
        return _read_mask(shape, desc, item, points[0], masks)
    if kind == "rectangle" and len(points) in (2, 4):
        x, y = zip(*points, strict=True)
        return PixelObject(item=item, desc=desc, geometry="bbox_2d", points=(min(x), min(y), max(x), max(y)))
    conversion = ""
    if kind == "circle" and len(points) == 2:
        points, conversion = _circle(*points), "circle to polygon"
    elif kind not in ("polygon", "oriented_rectangle") or len(points) < 3:
        raise AnnotationProblem(
            "shape type",
            f"got a {kind} of {len(points)} points, expected a polygon of 3 or more, a rectangle, circle or "
            "mask of 2",
        )
    flat = tuple(value for point in points for value in point)
    return PixelObject(item=item, desc=desc, geometry="poly", points=flat, conversion=conversion)


def _circle(centre: tuple[float, float], rim: tuple[float, float]) -> list[tuple[float, float]]:
    """Return a polygon around ``centre`` through ``rim``, clockwise on the screen, of the circle's area."""
    radius = math.dist(centre, rim)
    step = 2 * math.pi / CIRCLE_VERTICES
    reach = radius * math.sqrt(step / math.sin(step))
    return [
        (centre[0] + reach * math.cos(number * step), centre[1] + reach * math.sin(number * step))
        for number in range(CIRCLE_VERTICES)
    ]


def _read_mask(
    shape: dict[str, Any], desc: str, item: str, corner: tuple[float, float], masks: MaskMode
) -> PixelObject:
    """Return what the bitmap in ``mask`` (a PNG in base64) covers, its first pixel at ``corner``."""
    from PIL import Image, UnidentifiedImageError

    text = shape.get("mask")
    try:
        if not isinstance(text, str):
            raise ValueError(f"got {text!r:.40}, expected base64 text")
        with Image.open(BytesIO(base64.b64decode(text, validate=True))) as stored:
            bitmap = np.asarray(stored.convert("L")) > 0
    except (binascii.Error, OSError, UnidentifiedImageError, SyntaxError, ValueError) as exc:
        raise AnnotationProblem("mask", f"mask cannot be read as a picture ({exc})") from exc
    geometry, points = shape_of_parts(bitmap_parts(bitmap, offset=corner), masks)
    return PixelObject(item=item, desc=desc, geometry=geometry, points=points, conversion=f"mask to {masks}")


def _read_point(point: Any, index: int) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2:
        raise AnnotationProblem("no points", f"points[{index}]: got {point!r:.40}, expected [x, y]")
    return annotation_number(point[0], f"points[{index}].x"), annotation_number(
        point[1], f"points[{index}].y"
    )
