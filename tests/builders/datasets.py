"""Data set lines, pictures and foreign data sets on disk, valid by default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

BOX = {"desc": "RBC", "bbox_2d": [10, 20, 300, 400]}
POLYGON = {"desc": "leaf", "poly": [100, 10, 300, 200, 50, 400]}


def write_picture(
    file: Path, width: int = 64, height: int = 48, colour: tuple[int, int, int] = (200, 120, 40)
) -> Path:
    """Write a picture of one colour and return its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(file)
    return file


def dataset_line(**changes: Any) -> dict[str, Any]:
    """Return a valid line of a data set; ``changes`` replace fields, ``...`` takes a field away."""
    line = {"images": ["images/one.png"], "width": 64, "height": 48, "objects": [dict(BOX)]} | changes
    return {name: value for name, value in line.items() if value is not ...}


def write_jsonl(file: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write ``lines`` (maps, or text as it stands) and return the file."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def write_voc(
    folder: Path,
    objects_by_name: Mapping[str, Sequence[tuple[str, int, int, int, int]]],
    splits: Mapping[str, Sequence[str]] | None = None,
    size: tuple[int, int] = (64, 48),
) -> Path:
    """Write a VOC folder: annotations with 1-based (name, xmin, ymin, xmax, ymax), pictures and splits."""
    (folder / "Annotations").mkdir(parents=True)
    for name, objects in objects_by_name.items():
        write_picture(folder / "JPEGImages" / f"{name}.jpg", *size)
        boxes = "".join(_voc_object(*item) for item in objects)
        text = (
            f"<annotation><filename>{name}.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{boxes}</annotation>"
        )
        (folder / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    for split, names in (splits or {}).items():
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def _voc_object(name: str, *sides: int) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True)
    box = "".join(f"<{tag}>{side}</{tag}>" for tag, side in tags)
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def write_coco(folder: Path, annotations: Sequence[Mapping[str, Any]], split: str = "train2017") -> Path:
    """Write a COCO folder of one picture, id 1, 64x48 pixels, with ``annotations`` of category 7, ``cup``."""
    write_picture(folder / split / "one.png")
    filled = [
        {"id": number, "image_id": 1, "category_id": 7, "bbox": [8, 6, 20, 12], **annotation}
        for number, annotation in enumerate(annotations, start=1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "one.png", "width": 64, "height": 48}],
        "categories": [{"id": 7, "name": "cup"}],
        "annotations": filled,
    }
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_labelme(folder: Path, name: str, shapes: Sequence[Mapping[str, Any]] | int, **changes: Any) -> Path:
    """Write one labelme JSON with its picture of 64x48 pixels beside it and return the JSON file.

    ``shapes`` that are no list are written as they stand.
    """
    filled = (
        shapes
        if isinstance(shapes, int)
        else [{"label": "leaf", "shape_type": "polygon", **shape} for shape in shapes]
    )
    write_picture(folder / f"{name}.png")
    content = {
        "imagePath": f"{name}.png",
        "imageWidth": 64,
        "imageHeight": 48,
        "shapes": filled,
    } | changes
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file under ``folder`` with its bytes, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
