"""Reads Pascal VOC: Annotations/*.xml, JPEGImages/, ImageSets/Main/{train,val,test}.txt.

VOC counts pixels from 1 and boxes include their last pixel, so every coordinate loses 1: the box of the
whole image, (1, 1, width, height), becomes (0, 0, width - 1, height - 1), which is bins 0 to 999.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePosixPath
from typing import Final

from broker_schemas.errors import DataError
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    PixelImage,
    PixelObject,
    SourceContent,
    annotation_number,
    seeded_split,
)
from rollstream.datasets.importing.report import ImportProblem

SPLITS: Final = ("train", "val", "test")
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp")
_SIDES: Final = ("xmin", "ymin", "xmax", "ymax")


def read_voc(source: Path, *, seed: int = 0) -> SourceContent:
    """Return the content of a VOC folder, in the order of its split files.

    Without split files the annotations are split by ``seed``. Raises DataError where there is no Annotations
    folder with XML files in it.
    """
    annotations = source / "Annotations"
    names = sorted(path.stem for path in annotations.glob("*.xml"))
    if not names:
        raise DataError(
            f"{source}: no Annotations/*.xml, expected a VOC folder with Annotations, JPEGImages and "
            "ImageSets/Main; check the path"
        )
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    num_unreadable = 0
    for split, name in _split_names(source, names, seed):
        file = annotations / f"{name}.xml"
        try:
            _check_name(name, split)
            image, found = _read_annotation(source, file, split)
        except AnnotationProblem as exc:
            num_unreadable += 1
            problems.append(ImportProblem(file=str(file), item="image", kind=exc.kind, reason=str(exc)))
            continue
        images.append(image)
        problems.extend(found)
    return SourceContent(images=tuple(images), problems=tuple(problems), num_images_unreadable=num_unreadable)


def _split_names(source: Path, names: list[str], seed: int) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for split in SPLITS:
        file = source / "ImageSets" / "Main" / f"{split}.txt"
        if file.is_file():
            # a second column, where there is one, is a flag for one class
            lines = file.read_text(encoding="utf-8").splitlines()
            listed += [(split, words[0]) for line in lines if (words := line.split())]
    if listed:
        return listed
    chosen = seeded_split(names, seed)
    return [(chosen[name], name) for name in names]


def _check_name(name: str, split: str) -> None:
    if PurePosixPath(name).name != name or name == "..":
        raise AnnotationProblem(
            "name", f"{split}.txt: got {name!r:.80}, expected the bare name of an annotation"
        )


def _read_annotation(source: Path, file: Path, split: str) -> tuple[PixelImage, list[ImportProblem]]:
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError as exc:
        raise AnnotationProblem(
            "no annotation", f"named in {split}.txt, but the file does not exist"
        ) from exc
    except (OSError, ElementTree.ParseError, UnicodeDecodeError) as exc:
        raise AnnotationProblem("unreadable annotation", f"not readable as XML ({exc})") from exc
    image_file = _find_image(source, file.stem, root.findtext("filename", "").strip())
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    elements = root.findall("object")
    for number, element in enumerate(elements, start=1):
        item = f"object {number} ({element.findtext('name', '').strip() or 'no name'})"
        try:
            objects.append(_read_object(element, item))
        except AnnotationProblem as exc:
            problems.append(ImportProblem(file=str(file), item=item, kind=exc.kind, reason=str(exc)))
    image = PixelImage(
        split=split,
        annotation=str(file),
        image_file=image_file,
        target_path=image_file.name,
        sample_id=file.stem,
        size=_read_size(root),
        objects=tuple(objects),
        num_broken=len(elements) - len(objects),
    )
    return image, problems


def _find_image(source: Path, name: str, stated: str) -> Path:
    folder = source / "JPEGImages"
    candidates = [f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
    if stated and PurePosixPath(stated).name == stated:
        candidates.insert(0, stated)
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    raise AnnotationProblem("no image", f"got no image {stated or name} in {folder}, expected one")


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    sides = [root.findtext(f"size/{name}", "0").strip() for name in ("width", "height")]
    width, height = (int(annotation_number(side or "0", "size")) for side in sides)
    return (width, height) if width > 0 and height > 0 else None


def _read_object(element: ElementTree.Element, item: str) -> PixelObject:
    box = element.find("bndbox")
    if box is None:
        raise AnnotationProblem("no box", "got no bndbox, expected one")
    points = tuple(annotation_number(box.findtext(side), f"bndbox.{side}") - 1 for side in _SIDES)
    return PixelObject(item=item, desc=element.findtext("name", ""), geometry="bbox_2d", points=points)
