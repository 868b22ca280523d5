"""Reads Pascal VOC: an XML a picture, with boxes whose pixels are counted from 1, or from 0.

Counted from 1 the box of the whole image, (1, 1, width, height), becomes (0, 0, width - 1, height - 1),
which is bins 0 to 999.
"""

from __future__ import annotations

import dataclasses
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

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
from rollstream.datasets.importing.splits import choose_splits, folder_split

SPLITS: Final = ("train", "val", "test")
_SIDES: Final = ("xmin", "ymin", "xmax", "ymax")
_FEWEST_ZEROS: Final = 2


def read_voc(source: Path, options: ReadOptions) -> SourceContent:
    """Return the content of a VOC folder, in the order of its split files.

    Annotations may lie in any folder below ``source``, or ``source`` is the folder of annotations itself with
    its pictures beside it. Without split files, folders named after splits or ``options`` decide. Raises
    DataError where there is no XML of VOC's.
    """
    folder = _annotation_folder(source)
    names = {
        file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.xml"))
    }
    if not names:
        raise DataError(
            f"{source}: no *.xml in it, expected a VOC folder: annotations as XML, pictures beside them or "
            "in a folder of their own (Annotations and JPEGImages, say); check the path"
        )
    index = PictureIndex(_picture_root(source))
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    lost_images = lost_objects = 0
    for split, name in _split_names(index.root, names, options):
        file = names.get(name, folder / f"{name}.xml")
        try:
            _check_name(name, split)
            image, found = _read_annotation(index, file, name, split)
        except AnnotationProblem as exc:
            lost_images += 1
            lost_objects += exc.num_objects
            problems.append(ImportProblem(file=str(file), item="image", kind=exc.kind, reason=str(exc)))
            continue
        images.append(image)
        problems.extend(found)
    base, note = _base(images, options)
    return SourceContent(
        images=tuple(_counted_from_zero(image, base) for image in images),
        problems=tuple(problems),
        num_images_unreadable=lost_images,
        num_objects_unreadable=lost_objects,
        notes=(note,),
    )


def _annotation_folder(source: Path) -> Path:
    """Return the folder below which sample ids count: ``Annotations``, else the deepest with all XML."""
    standard = source / "Annotations"
    if any(standard.rglob("*.xml")):
        return standard
    parents = [str(file.parent) for file in source.rglob("*.xml")]
    return Path(os.path.commonpath(parents)) if parents else source


def _picture_root(source: Path) -> Path:
    """Return the folder below which pictures are looked for: the parent of a bare folder of annotations."""
    has_pictures = bool(PictureIndex(source).paths())
    return source if has_pictures or source.resolve().parent == source.resolve() else source.parent


def _split_names(root: Path, names: dict[str, Path], options: ReadOptions) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for split in () if options.is_resplit else SPLITS:
        file = root / "ImageSets" / "Main" / f"{split}.txt"
        if file.is_file():
            # a second column, where there is one, is a flag for one class
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            listed += [(split, words[0].replace("\\", "/")) for line in lines if (words := line.split())]
    if listed:
        return listed
    own = {
        name: folder_split(PurePosixPath(file.relative_to(root).as_posix())) for name, file in names.items()
    }
    chosen = choose_splits(own, options)
    return [(chosen[name], name) for name in names]


def _check_name(name: str, split: str) -> None:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise AnnotationProblem(
            "name", f"{split}.txt: got {name!r:.80}, expected the name of an annotation inside the folder"
        )


def _read_annotation(
    index: PictureIndex, file: Path, name: str, split: str
) -> tuple[PixelImage, list[ImportProblem]]:
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError as exc:
        raise AnnotationProblem(
            "no annotation", f"named in {split}.txt, but the file does not exist"
        ) from exc
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as exc:
        raise AnnotationProblem("unreadable annotation", f"not readable as XML ({exc})") from exc
    if root.tag != "annotation":
        raise AnnotationProblem("unreadable annotation", f"got <{root.tag}>, expected <annotation>")
    elements = root.findall("object")
    near = PurePosixPath(file.relative_to(index.root).as_posix())
    stated = root.findtext("filename", "").strip() or root.findtext("path", "").strip()
    try:
        path = _find_picture(index, stated, near)
    except AnnotationProblem as exc:
        raise AnnotationProblem(exc.kind, str(exc), num_objects=len(elements)) from exc
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    for number, element in enumerate(elements, start=1):
        item = f"object {number} ({element.findtext('name', '').strip() or 'no name'})"
        try:
            objects.append(_read_object(element, item))
        except AnnotationProblem as exc:
            problems.append(
                ImportProblem(file=str(file), item=f"{item} of {name}", kind=exc.kind, reason=str(exc))
            )
    image = PixelImage(
        split=split,
        annotation=str(file),
        picture=index.file(path),
        target_path=(PurePosixPath(name).parent / path.name).as_posix(),
        sample_id=name,
        size=stated_size(root.findtext("size/width"), root.findtext("size/height")),
        objects=tuple(objects),
        num_broken=len(elements) - len(objects),
        are_pixel_centres=True,
    )
    return image, problems


def _find_picture(index: PictureIndex, stated: str, near: PurePosixPath) -> PurePosixPath:
    """Return the picture of the stated name, else the one named as the annotation is."""
    try:
        return index.find(stated, near, stem=near.stem)
    except AnnotationProblem:
        # of several with the stated name, or none: what bears the annotation's own name
        return index.find("", near, stem=near.stem)


def _read_object(element: ElementTree.Element, item: str) -> PixelObject:
    box = element.find("bndbox")
    if box is None:
        raise AnnotationProblem("no box", "got no bndbox, expected one")
    points = tuple(annotation_number(box.findtext(side), f"bndbox.{side}") for side in _SIDES)
    return PixelObject(item=item, desc=element.findtext("name", ""), geometry="bbox_2d", points=points)


def _base(images: Sequence[PixelImage], options: ReadOptions) -> tuple[int, str]:
    """Return from which number the pixels are counted, and a line that says why.

    Boxes touch the frame at its first pixel and at its last: a set counted from 0 has zeros and never the
    width. One zero alone is a slip.
    """
    if options.base is not None:
        return options.base, f"pixels counted from {options.base}, as asked"
    zeros = others = 0
    for image in images:
        for item in image.objects:
            zeros += sum(value == 0 for value in item.points[:2])
            others += sum(value == 1 for value in item.points[:2])
            if image.size is not None:
                others += item.points[2] == image.size[0]
                others += item.points[3] == image.size[1]
    if zeros >= _FEWEST_ZEROS and zeros > others:
        return 0, f"pixels counted from 0: {zeros} box sides lie at 0 (--base 1 for the other way)"
    return 1, "pixels counted from 1, as VOC does (--base 0 for the other way)"


def _counted_from_zero(image: PixelImage, base: int) -> PixelImage:
    if base == 0:
        return image
    objects = tuple(
        dataclasses.replace(item, points=tuple(value - base for value in item.points))
        for item in image.objects
    )
    return dataclasses.replace(image, objects=objects)
