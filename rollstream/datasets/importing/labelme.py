"""Reads labelme: one JSON an image, with polygons and rectangles in pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from broker_schemas.errors import DataError
from broker_schemas.method.images import confine_image_path
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    PixelImage,
    PixelObject,
    SourceContent,
    annotation_number,
    seeded_split,
)
from rollstream.datasets.importing.report import ImportProblem


def read_labelme(source: Path, *, seed: int = 0) -> SourceContent:
    """Return the content of every labelme JSON under ``source``, in path order, split by ``seed``.

    Raises DataError where no file under ``source`` is labelme's.
    """
    loaded = [(file, _load(file)) for file in sorted(source.rglob("*.json"))]
    files = [
        (file, content) for file, content in loaded if not isinstance(content, dict) or "shapes" in content
    ]
    if not any(isinstance(content, dict) for _, content in files):
        raise DataError(f"{source}: no labelme file (*.json with shapes) in it; check the path")
    names = {file: file.relative_to(source).with_suffix("").as_posix() for file, _ in files}
    split = seeded_split(list(names.values()), seed)
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    for file, content in files:
        try:
            image, found = _read_annotation(source, file, content, split[names[file]], names[file])
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item="image", kind=exc.kind, reason=str(exc)))
            continue
        images.append(image)
        problems.extend(found)
    return SourceContent(
        images=tuple(images), problems=tuple(problems), num_images_unreadable=len(files) - len(images)
    )


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        return exc


def _read_annotation(
    source: Path, file: Path, content: Any, split: str, name: str
) -> tuple[PixelImage, list[ImportProblem]]:
    if not isinstance(content, dict) or not isinstance(content["shapes"], list):
        raise AnnotationProblem("unreadable annotation", f"not readable as labelme JSON ({content!r:.120})")
    stated = str(content.get("imagePath") or "").replace("\\", "/")
    if not stated:
        raise AnnotationProblem("no image", "imagePath is missing, expected a path relative to the file")
    try:
        image_file = confine_image_path(source, stated, relative_to=file.parent)
    except DataError as exc:
        raise AnnotationProblem("image outside", str(exc)) from exc
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for number, shape in enumerate(content["shapes"], start=1):
        label = shape.get("label") if isinstance(shape, dict) else None
        item = f"shape {number} ({label or 'no label'})"
        try:
            objects.append(_read_shape(shape, item))
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
    image = PixelImage(
        split=split,
        annotation=str(file),
        image_file=image_file,
        target_path=f"{name}{image_file.suffix}",
        sample_id=name,
        size=_read_size(content),
        objects=tuple(objects),
        num_broken=len(problems),
    )
    return image, problems


def _read_size(content: dict[str, Any]) -> tuple[int, int] | None:
    width, height = content.get("imageWidth"), content.get("imageHeight")
    if not isinstance(width, int) or not isinstance(height, int) or width < 1 or height < 1:
        return None
    return width, height


def _read_shape(shape: Any, item: str) -> PixelObject:
    if not isinstance(shape, dict) or not isinstance(shape.get("points"), list):
        raise AnnotationProblem("no points", "got no list of points, expected one")
    desc = shape.get("label")
    points = [_read_point(point, index) for index, point in enumerate(shape["points"])]
    kind = shape.get("shape_type", "polygon")
    if kind == "rectangle" and len(points) == 2:
        (x1, x2), (y1, y2) = (sorted(values) for values in zip(*points, strict=True))
        flat: tuple[float, ...] = (x1, y1, x2, y2)
    elif kind == "polygon" and len(points) >= 3:
        flat = tuple(value for point in points for value in point)
    else:
        raise AnnotationProblem(
            "shape type",
            f"got a {kind} of {len(points)} points, expected a polygon of 3 or more or a rectangle of 2",
        )
    geometry: Literal["bbox_2d", "poly"] = "bbox_2d" if kind == "rectangle" else "poly"
    return PixelObject(item=item, desc=desc if isinstance(desc, str) else "", geometry=geometry, points=flat)


def _read_point(point: Any, index: int) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2:
        raise AnnotationProblem("no points", f"points[{index}]: got {point!r:.40}, expected [x, y]")
    return annotation_number(point[0], f"points[{index}].x"), annotation_number(
        point[1], f"points[{index}].y"
    )
