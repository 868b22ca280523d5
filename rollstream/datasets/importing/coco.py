"""Reads COCO instances files: boxes (x, y, width, height), polygons and masks in pixels counted from 0.

An object with one polygon becomes that polygon; several parts and run-length masks become what ``masks``
says; a mask that cannot be read, or no segmentation at all, leaves the box. Crowd regions are no single
object and are left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from broker_schemas.errors import DataError
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    PixelImage,
    PixelObject,
    ReadOptions,
    SourceContent,
    annotation_number,
    stated_size,
)
from rollstream.datasets.importing.masks import (
    bitmap_parts,
    decode_run_lengths,
    polygon_part,
    shape_of_parts,
)
from rollstream.datasets.importing.picture_index import PictureIndex
from rollstream.datasets.importing.report import ImportProblem
from rollstream.datasets.importing.splits import choose_splits, folder_split, named_split

_TABLES = ("images", "annotations")


def read_coco(source: Path, options: ReadOptions) -> SourceContent:
    """Return the content of the COCO files in ``source``, or of the one file that it is.

    Of several kinds of JSON those named ``instances_*`` are read, else all with images and annotations. A
    file or its folder named after a split is that split; the images of the others are split by ``options``.
    Raises DataError where there is no such file, or one is torn.
    """
    root = source if source.is_dir() else source.parent
    found = _find_files(source)
    index = PictureIndex(root if _has_pictures(root) else root.parent)
    splits = _split_by_file(root, found, options)
    names = {
        f"{number}:{row.get('file_name') or row.get('coco_url')}": splits[file]
        for number, (file, content) in enumerate(found.items())
        for row in content["images"]
    }
    chosen = choose_splits(names, options)
    contents = [
        _read_file(index, file, content, number, chosen, options)
        for number, (file, content) in enumerate(found.items())
    ]
    return SourceContent(
        images=tuple(image for content in contents for image in content.images),
        problems=tuple(problem for content in contents for problem in content.problems),
        num_images_unreadable=sum(content.num_images_unreadable for content in contents),
        num_objects_unreadable=sum(content.num_objects_unreadable for content in contents),
    )


def _has_pictures(root: Path) -> bool:
    return bool(PictureIndex(root).paths()) or root.resolve().parent == root.resolve()


def _find_files(source: Path) -> dict[Path, dict[str, Any]]:
    if source.is_file():
        return {source: _checked(source, _load(source))}
    named = sorted(source.rglob("instances_*.json"))
    if named:
        return {file: _checked(file, _load(file)) for file in named}
    loaded = {}
    torn: list[DataError] = []
    for file in sorted(source.rglob("*.json")):
        try:
            content = _load(file)
        except DataError as exc:
            torn.append(exc)
            continue
        if _is_coco(content):
            loaded[file] = _checked(file, content)
    if not loaded and torn:
        raise torn[0]
    if not loaded:
        raise DataError(
            f"{source}: no JSON with images and annotations in it, expected a COCO folder or file; "
            "check the path"
        )
    return loaded


def _is_coco(content: Any) -> bool:
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _TABLES):
        return False
    rows = content["annotations"]
    # captions and the like have images and annotations too
    return not rows or any(isinstance(row, dict) and "category_id" in row for row in rows)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{file}: not readable as JSON ({exc}); download it again") from exc


def _checked(file: Path, content: Any) -> dict[str, Any]:
    for name in _TABLES:
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file}: {name} is no list of maps, expected a COCO instances file")
    return dict(content)


def _split_by_file(
    root: Path, files: dict[Path, dict[str, Any]], options: ReadOptions
) -> dict[Path, str | None]:
    """Return the split of each file; two of one split keep their full names apart."""
    short = {
        file: named_split(file.stem) or folder_split(PurePosixPath(file.relative_to(root).as_posix()))
        for file in files
    }
    if options.is_resplit:
        return dict.fromkeys(files)
    known = [split for split in short.values() if split]
    if len(set(known)) < len(known):
        full = {file: file.stem.removeprefix("instances_") for file in files}
        if len(set(full.values())) == len(files):
            return {file: full[file] if short[file] else None for file in files}
    return short


def _read_file(
    index: PictureIndex,
    file: Path,
    content: dict[str, Any],
    number: int,
    chosen: dict[str, str],
    options: ReadOptions,
) -> SourceContent:
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    num_lost_objects = 0
    names = _category_names(content)
    rows_by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        rows_by_image[str(row.get("image_id"))].append(row)
    for row in content["images"]:
        rows = rows_by_image.pop(str(row.get("id")), [])
        split = chosen[f"{number}:{row.get('file_name') or row.get('coco_url')}"]
        try:
            image, found = _read_image(index, file, split, row, rows, names, options)
        except AnnotationProblem as exc:
            item = f"image {row.get('id')}"
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
            num_lost_objects += len(rows)
            continue
        images.append(image)
        problems.extend(found)
    orphans = _orphans(file, rows_by_image)
    return SourceContent(
        images=tuple(images),
        problems=(*problems, *orphans),
        num_images_unreadable=len(content["images"]) - len(images),
        num_objects_unreadable=num_lost_objects + len(orphans),
    )


def _category_names(content: dict[str, Any]) -> dict[str, str]:
    rows = content.get("categories")
    rows = rows if isinstance(rows, list) else []
    return {str(row.get("id")): str(row.get("name") or "") for row in rows if isinstance(row, dict)}


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
    index: PictureIndex,
    file: Path,
    split: str,
    row: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    names: dict[str, str],
    options: ReadOptions,
) -> tuple[PixelImage, list[ImportProblem]]:
    stated = row.get("file_name") or row.get("coco_url")  # LVIS has the address alone
    if not isinstance(stated, str) or not stated:
        raise AnnotationProblem("no image", f"file_name: got {stated!r:.80}, expected a path")
    path = _find_picture(index, file, stated)
    size = stated_size(row.get("width"), row.get("height"))
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for entry in rows:
        item = f"annotation {entry.get('id')}"
        try:
            objects.append(_read_object(entry, item, names, size, options))
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
    image = PixelImage(
        split=split,
        annotation=str(file),
        picture=index.file(path),
        target_path=f"{split}/{_short_path(path, split).as_posix()}",
        sample_id=_short_path(path, split).with_suffix("").as_posix(),
        size=size,
        objects=tuple(objects),
        num_broken=len(problems),
    )
    return image, problems


def _find_picture(index: PictureIndex, file: Path, stated: str) -> PurePosixPath:
    near = PurePosixPath(file.relative_to(index.root).as_posix())
    # train2017/… of an instances_train2017.json counts as near, and so does images/train2017/…
    hint = near.parent / file.stem.removeprefix("instances_") / near.name
    return index.find(stated, hint)


def _short_path(path: PurePosixPath, split: str) -> PurePosixPath:
    """Return ``path`` without the folders that hold all images of a split."""
    parts = list(path.parts)
    while len(parts) > 1 and (parts[0].lower() in ("images", "data") or named_split(parts[0]) is not None):
        parts.pop(0)
    return PurePosixPath(*parts)


def _read_object(
    row: dict[str, Any],
    item: str,
    names: dict[str, str],
    size: tuple[int, int] | None,
    options: ReadOptions,
) -> PixelObject:
    if _is_crowd(row):
        raise AnnotationProblem("crowd", "a crowd region is no single object; it cannot be learned as one")
    desc = names.get(str(row.get("category_id")), "")
    if not desc:
        raise AnnotationProblem("label", f"category_id {row.get('category_id')!r} names no category")
    segmentation = row.get("segmentation") or []
    if isinstance(segmentation, dict):
        try:
            parts = bitmap_parts(decode_run_lengths(segmentation, size))
            geometry, points = shape_of_parts(parts, options.masks)
        except AnnotationProblem:
            return _box(row, item, desc, "unreadable mask to its box")
        conversion = f"mask to {options.masks}"
        return PixelObject(item=item, desc=desc, geometry=geometry, points=points, conversion=conversion)
    if isinstance(segmentation, list) and segmentation and isinstance(segmentation[0], list):
        return _polygons(segmentation, item, desc, options)
    return _box(row, item, desc, "")


def _is_crowd(row: dict[str, Any]) -> bool:
    """Say whether a row is a crowd region; CVAT marks every mask as one and says otherwise by attribute."""
    attributes = row.get("attributes")
    if isinstance(attributes, dict) and isinstance(row.get("segmentation"), dict):
        return bool(attributes.get("is_crowd", False))
    return bool(row.get("iscrowd"))


def _polygons(segmentation: list[Any], item: str, desc: str, options: ReadOptions) -> PixelObject:
    parts = []
    for part in segmentation:
        values = [annotation_number(value, "segmentation") for value in part]
        if len(values) < 6 or len(values) % 2:
            if len(segmentation) > 1:
                continue  # a stray part of two points beside whole ones
            raise AnnotationProblem(
                "segmentation", f"got {len(values)} numbers, expected an even number of at least 6"
            )
        parts.append(values)
    if len(segmentation) == 1:
        return PixelObject(item=item, desc=desc, geometry="poly", points=tuple(parts[0]))
    geometry, points = shape_of_parts([polygon_part(part) for part in parts], options.masks)
    conversion = f"several parts to {options.masks}"
    return PixelObject(item=item, desc=desc, geometry=geometry, points=points, conversion=conversion)


def _box(row: dict[str, Any], item: str, desc: str, conversion: str) -> PixelObject:
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise AnnotationProblem("no box", f"bbox: got {box!r:.80}, expected [x, y, width, height]")
    x, y, width, height = (annotation_number(value, "bbox") for value in box)
    return PixelObject(
        item=item,
        desc=desc,
        geometry="bbox_2d",
        points=(x, y, x + width, y + height),
        conversion=conversion,
    )
