"""Reads COCO instances files: boxes (x, y, width, height) and polygons in pixels counted from 0.

An object with one polygon becomes that polygon; with none, or with several parts, its box. Run-length masks
(RLE) of single objects refuse the whole import; crowd regions, which are no single object, are left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from broker_schemas.errors import DataError
from broker_schemas.method.images import absolute_root, confine_image_path
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    PixelImage,
    PixelObject,
    SourceContent,
    annotation_number,
)
from rollstream.datasets.importing.report import ImportProblem

_SPLIT_NAME = re.compile(r"(train|val|test)[0-9]*")


def read_coco(source: Path, *, seed: int = 0) -> SourceContent:
    """Return the content of every ``instances_*.json`` in ``source`` or ``source/annotations``.

    ``instances_train2017.json`` is split ``train``; its images are looked for in ``train2017``,
    ``images/train2017``, ``images`` and ``source`` itself. ``seed`` is not needed: the files are the splits.
    Raises DataError where there is no such file, or for RLE masks.
    """
    files = sorted([*source.glob("annotations/instances_*.json"), *source.glob("instances_*.json")])
    if not files:
        raise DataError(
            f"{source}: no annotations/instances_*.json, expected a COCO folder; check the path, and rename "
            "a file of another name to instances_train.json"
        )
    splits = _split_by_file(files)
    contents = [_read_file(source, file, splits[file]) for file in files]
    return SourceContent(
        images=tuple(image for content in contents for image in content.images),
        problems=tuple(problem for content in contents for problem in content.problems),
        num_images_unreadable=sum(content.num_images_unreadable for content in contents),
    )


def _split_by_file(files: list[Path]) -> dict[Path, str]:
    full = {file: file.stem.removeprefix("instances_") for file in files}
    short = {
        file: match.group(1) if (match := _SPLIT_NAME.fullmatch(name)) else name
        for file, name in full.items()
    }
    return short if len(set(short.values())) == len(files) else full


def _read_file(source: Path, file: Path, split: str) -> SourceContent:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{file}: not readable as JSON ({exc}); download it again") from exc
    image_rows, annotation_rows = (_read_table(file, content, name) for name in ("images", "annotations"))
    _refuse_masks(file, annotation_rows)
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    names = _category_names(content)
    rows_by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in annotation_rows:
        rows_by_image[str(row.get("image_id"))].append(row)
    for row in image_rows:
        rows = rows_by_image.pop(str(row.get("id")), [])
        try:
            image, found = _read_image(source, file, split, row, rows, names)
        except AnnotationProblem as exc:
            item = f"image {row.get('id')}"
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
            continue
        images.append(image)
        problems.extend(found)
    problems.extend(_orphans(file, rows_by_image))
    return SourceContent(
        images=tuple(images),
        problems=tuple(problems),
        num_images_unreadable=len(image_rows) - len(images),
    )


def _read_table(file: Path, content: Any, name: str) -> list[dict[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: {name} is no list of maps, expected a COCO instances file")
    return rows


def _category_names(content: dict[str, Any]) -> dict[str, str]:
    rows = content.get("categories")
    rows = rows if isinstance(rows, list) else []
    return {str(row.get("id")): str(row.get("name") or "") for row in rows if isinstance(row, dict)}


def _refuse_masks(file: Path, rows: list[dict[str, Any]]) -> None:
    masked = [row for row in rows if isinstance(row.get("segmentation"), dict) and not row.get("iscrowd")]
    if masked:
        raise DataError(
            f"{file}: got {len(masked)} objects with run-length masks (RLE), first annotation "
            f"{masked[0].get('id')}, expected polygons or boxes; turn the masks into polygons, or take "
            "'segmentation' out of the file to import their boxes"
        )


def _orphans(file: Path, rows_by_image: dict[str, list[dict[str, Any]]]) -> list[ImportProblem]:
    return [
        ImportProblem(
            file=str(file),
            item=f"annotation {row.get('id')}",
            kind="no image",
            reason=f"image_id {image_id} names no image of this file",
        )
        for image_id, rows in rows_by_image.items()
        for row in rows
    ]


def _read_image(
    source: Path,
    file: Path,
    split: str,
    row: dict[str, Any],
    rows: list[dict[str, Any]],
    names: dict[str, str],
) -> tuple[PixelImage, list[ImportProblem]]:
    stated = row.get("file_name")
    if not isinstance(stated, str) or not stated:
        raise AnnotationProblem("no image", f"file_name: got {stated!r:.80}, expected a path")
    image_file, relative_path = _find_image(source, file.stem.removeprefix("instances_"), stated)
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for entry in rows:
        item = f"annotation {entry.get('id')}"
        try:
            objects.append(_read_object(entry, item, names))
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
    width, height = row.get("width"), row.get("height")
    has_size = type(width) is int and type(height) is int and width > 0 and height > 0
    image = PixelImage(
        split=split,
        annotation=str(file),
        image_file=image_file,
        target_path=f"{split}/{relative_path.as_posix()}",
        sample_id=relative_path.with_suffix("").as_posix(),
        size=(int(width), int(height)) if has_size and width and height else None,
        objects=tuple(objects),
        num_broken=len(problems),
    )
    return image, problems


def _find_image(source: Path, split_name: str, stated: str) -> tuple[Path, Path]:
    """Return the image's file and its path relative to the folder it was found in."""
    folders = [source / split_name, source / "images" / split_name, source / "images", source]
    for folder in folders:
        try:
            candidate = confine_image_path(folder, stated)
        except DataError as exc:
            raise AnnotationProblem("image outside", str(exc)) from exc
        if candidate.is_file():
            return candidate, candidate.relative_to(absolute_root(folder))
    places = ", ".join(str(folder) for folder in folders)
    raise AnnotationProblem("no image", f"got no image {stated} in {places}, expected one")


def _read_object(row: dict[str, Any], item: str, names: dict[str, str]) -> PixelObject:
    if row.get("iscrowd"):
        raise AnnotationProblem("crowd", "a crowd region is no single object; it cannot be learned as one")
    desc = names.get(str(row.get("category_id")), "")
    if not desc:
        raise AnnotationProblem("label", f"category_id {row.get('category_id')!r} names no category")
    parts = row.get("segmentation") or []
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], list):
        values = [annotation_number(value, "segmentation") for value in parts[0]]
        if len(values) < 6 or len(values) % 2:
            raise AnnotationProblem(
                "segmentation", f"got {len(values)} numbers, expected an even number of at least 6"
            )
        return PixelObject(item=item, desc=desc, geometry="poly", points=tuple(values))
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise AnnotationProblem("no box", f"bbox: got {box!r:.80}, expected [x, y, width, height]")
    x, y, width, height = (annotation_number(value, "bbox") for value in box)
    return PixelObject(item=item, desc=desc, geometry="bbox_2d", points=(x, y, x + width, y + height))
