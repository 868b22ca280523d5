"""Reads JSON Lines of Qwen-VL grounding: an image a line, with boxes in pixels or in 0 to 1000.

A line names its picture by ``image`` or ``images`` and holds its objects as a list, or as the JSON that the
assistant says in ``messages`` or ``conversations``; ``objects`` with ``ref`` and ``bbox`` is read too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

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
from rollstream.datasets.importing.picture_index import PictureIndex
from rollstream.datasets.importing.report import ImportProblem
from rollstream.datasets.importing.splits import choose_splits, folder_split, named_split

THOUSAND: Final = 1000.0
_LABELS: Final = ("label", "desc", "description", "category", "name", "ref", "phrase", "class")
_BOXES: Final = ("bbox_2d", "bbox", "box", "box_2d", "bounding_box")
_OBJECTS: Final = ("objects", "annotations", "detections", "boxes", "answer", "response", "solution")
_TAGGED: Final = re.compile(
    r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>((?:<\|box_start\|>.*?<\|box_end\|>)+)", re.DOTALL
)
_CORNERS: Final = re.compile(r"\(([-\d.]+),\s*([-\d.]+)\),\s*\(([-\d.]+),\s*([-\d.]+)\)")


def read_qwen(source: Path, options: ReadOptions) -> SourceContent:
    """Return the content of every ``*.jsonl`` in ``source``, or of the one file that it is, in file order.

    A file, or the folder of a picture, named after a split decides, else ``options``. ``options.coordinates``
    None looks: a number over 1000 means pixels, one beyond its picture 0 to 1000. Raises DataError where no
    line names a picture.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.jsonl"))
    root = source if source.is_dir() else source.parent
    index = PictureIndex(root if PictureIndex(root).paths() else root.parent)
    rows = [(file, number, row) for file in files for number, row in _rows(file)]
    if not any(isinstance(row, dict) and _stated_picture(row) for _, _, row in rows):
        raise DataError(
            f"{source}: no *.jsonl whose lines name an image, expected JSON Lines of Qwen-VL grounding; "
            "check the path"
        )
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    num_lost_objects = 0
    for file, number, row in rows:
        try:
            image, found = _read_row(index, file, number, row)
        except AnnotationProblem as exc:
            problems.append(
                ImportProblem(file=str(file), item=f"line {number}", kind=exc.kind, reason=str(exc))
            )
            num_lost_objects += exc.num_objects
            continue
        images.append(image)
        problems += found
    coordinates, note = _coordinates(images, options)
    splits = choose_splits(_own_splits(images), options)
    return SourceContent(
        images=tuple(
            dataclasses.replace(
                image if coordinates == "pixels" else _as_shares(image), split=splits[_key(image)]
            )
            for image in images
        ),
        problems=tuple(problems),
        num_images_unreadable=len(rows) - len(images),
        num_objects_unreadable=num_lost_objects,
        notes=(note,),
    )


def _key(image: PixelImage) -> str:
    return f"{image.annotation}:{image.sample_id}"


def _own_splits(images: Sequence[PixelImage]) -> dict[str, str | None]:
    return {
        _key(image): named_split(Path(image.annotation).stem)
        or folder_split(PurePosixPath(image.target_path))
        for image in images
    }


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{file}: cannot be read ({exc}); check the path, or save it as UTF-8") from exc
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{file}: not readable as JSON ({exc}); correct it") from exc
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as exc:
                yield number, exc


def _stated_picture(row: dict[str, Any]) -> str | None:
    for name in ("image", "images", "image_path", "img_path", "file_name"):
        value = row.get(name)
        value = value[0] if isinstance(value, list) and value else value
        value = (value.get("path") or value.get("image")) if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    for message in _messages(row):
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and isinstance(part.get("image"), str):
                return str(part["image"])
    return None


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    value = row.get("messages") or row.get("conversations") or []
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _read_row(
    index: PictureIndex, file: Path, number: int, row: Any
) -> tuple[PixelImage, list[ImportProblem]]:
    if not isinstance(row, dict):
        raise AnnotationProblem("unreadable annotation", f"not a JSON map ({row!r:.80})")
    stated = _stated_picture(row)
    entries = _entries(row)
    if stated is None:
        raise AnnotationProblem("no image", "names no image, expected image or images", len(entries))
    try:
        path = index.find(stated, PurePosixPath(file.relative_to(index.root).as_posix()))
    except AnnotationProblem as exc:
        raise AnnotationProblem(exc.kind, str(exc), len(entries)) from exc
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for position, entry in enumerate(entries, start=1):
        item = f"line {number}, object {position}"
        try:
            objects.append(_read_entry(entry, item))
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
    image = PixelImage(
        split="train",
        annotation=str(file),
        picture=index.file(path),
        target_path=path.as_posix(),
        sample_id=path.with_suffix("").as_posix(),
        size=stated_size(row.get("width"), row.get("height")),
        objects=tuple(objects),
        num_broken=len(problems),
    )
    return image, problems


def _entries(row: dict[str, Any]) -> list[Any]:
    """Return the objects of a line, wherever its writer put them; none for no objects.

    Raises AnnotationProblem for a line that says nothing about objects.
    """
    for name in _OBJECTS:
        if name in row:
            return _entries_of(row[name])
    for message in reversed(_messages(row)):
        if str(message.get("role") or message.get("from")).lower() in ("assistant", "gpt", "model"):
            content = message.get("content", message.get("value"))
            if isinstance(content, list):
                content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
            return _entries_of(content)
    raise AnnotationProblem("no objects", "has neither objects nor an answer of the assistant")


def _entries_of(value: Any) -> list[Any]:
    if isinstance(value, str):
        return _entries_in_text(value)
    if isinstance(value, dict) and any(isinstance(value.get(name), list) for name in ("bbox", "boxes")):
        boxes = value.get("bbox") or value.get("boxes") or []
        labels = value.get("ref") or value.get("label") or value.get("labels") or []
        if boxes and not isinstance(boxes[0], list):
            return [value]
        labels = [labels] * len(boxes) if isinstance(labels, str) else labels
        return [
            {"bbox_2d": box, "label": labels[number] if number < len(labels) else ""}
            for number, box in enumerate(boxes)
        ]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    raise AnnotationProblem("no objects", f"got {value!r:.60}, expected a list of objects")


def _entries_in_text(text: str) -> list[Any]:
    tagged = [
        {"bbox_2d": [*corners], "label": label}
        for label, boxes in _TAGGED.findall(text)
        for corners in _CORNERS.findall(boxes)
    ]
    if tagged:
        return tagged
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    inner = (fenced.group(1) if fenced else text).strip()
    try:
        value = json.loads(inner)
    except (ValueError, RecursionError) as exc:
        raise AnnotationProblem("no objects", f"the answer is no JSON ({inner!r:.60})") from exc
    if isinstance(value, str):
        raise AnnotationProblem("no objects", f"the answer is no list of objects ({inner!r:.60})")
    return _entries_of(value)


def _read_entry(entry: Any, item: str) -> PixelObject:
    if not isinstance(entry, dict):
        raise AnnotationProblem("no box", f"got {entry!r:.60}, expected a map with bbox_2d and label")
    desc = next((entry[name] for name in _LABELS if isinstance(entry.get(name), str)), "")
    polygon = entry.get("poly") or entry.get("polygon")
    if isinstance(polygon, list) and polygon:
        flat = [value for point in polygon for value in (point if isinstance(point, list) else [point])]
        values = [annotation_number(value, "poly") for value in flat]
        if len(values) < 6 or len(values) % 2:
            raise AnnotationProblem("segmentation", f"poly: got {len(values)} numbers, expected at least 6")
        return PixelObject(item=item, desc=desc, geometry="poly", points=tuple(values))
    box = next((entry[name] for name in _BOXES if name in entry), None)
    if isinstance(box, list) and len(box) == 1 and isinstance(box[0], list):
        box = box[0]
    if not isinstance(box, list) or len(box) != 4:
        raise AnnotationProblem("no box", f"got {box!r:.60}, expected bbox_2d with 4 numbers")
    points = tuple(annotation_number(value, "bbox_2d") for value in box)
    return PixelObject(item=item, desc=desc, geometry="bbox_2d", points=points)


def _coordinates(images: Sequence[PixelImage], options: ReadOptions) -> tuple[str, str]:
    if options.coordinates is not None:
        return options.coordinates, f"coordinates read as {options.coordinates}, as asked"
    largest, is_beyond, widest = 0.0, False, 0
    for image in images:
        size = image.size or _header_size(image.picture)
        widest = max(widest, *size) if size else widest
        for item in image.objects:
            largest = max(largest, *item.points)
            is_beyond = is_beyond or bool(
                size and (max(item.points[0::2]) > size[0] + 1 or max(item.points[1::2]) > size[1] + 1)
            )
    other = "the other way: --coordinates"
    if largest > THOUSAND:
        return "pixels", f"coordinates are pixels: the largest is {largest:g} ({other} thousandths)"
    if is_beyond or widest > THOUSAND:
        why = (
            "some lie beyond their picture" if is_beyond else f"none is over 1000, pictures are {widest} wide"
        )
        return "thousandths", f"coordinates are 0 to 1000: {why} ({other} pixels)"
    return "pixels", f"coordinates are taken for pixels: all lie inside their pictures ({other} thousandths)"


def _header_size(picture: Path | bytes) -> tuple[int, int] | None:
    from broker_schemas.method.images import read_image_size

    try:
        return read_image_size(picture) if isinstance(picture, Path) else None
    except DataError:
        return None


def _as_shares(image: PixelImage) -> PixelImage:
    objects = tuple(
        dataclasses.replace(item, points=tuple(value / THOUSAND for value in item.points))
        for item in image.objects
    )
    return dataclasses.replace(image, objects=objects, is_normalised=True)
