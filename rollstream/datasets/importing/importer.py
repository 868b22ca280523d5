"""Imports a foreign data set: read, check and convert everything, and only then write.

A first pass touches nothing but its own memory, so a refused import leaves no trace; the second copies
pictures and writes the splits into a folder that appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from broker_schemas.errors import DataError
from broker_schemas.records.records import MAX_ID_CHARS, GroundTruthObject
from rollstream.datasets.importing.coco import read_coco
from rollstream.datasets.importing.conversion import convert_object
from rollstream.datasets.importing.drafts import AnnotationProblem, PixelImage, SourceContent
from rollstream.datasets.importing.labelme import read_labelme
from rollstream.datasets.importing.picture_check import picture_size
from rollstream.datasets.importing.report import ImportProblem, ImportSummary, SplitCount, list_problems
from rollstream.datasets.importing.voc import read_voc
from rollstream.datasets.importing.writer import DraftSample, write_split
from rollstream.staged_folder import check_replaceable, staged_folder

MAKER: Final = "data import"
Kind = Literal["voc", "coco", "labelme"]
Progress = Callable[[int, int], None]
_READERS: Final[dict[str, Callable[..., SourceContent]]] = {
    "voc": read_voc,
    "coco": read_coco,
    "labelme": read_labelme,
}


@dataclass(frozen=True, kw_only=True)
class _Checked:
    image: PixelImage
    size: tuple[int, int]
    objects: tuple[GroundTruthObject, ...]


def import_dataset(
    kind: Kind,
    source: str | Path,
    destination: str | Path,
    *,
    strict: bool = False,
    link_images: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write ``source`` as JSONL splits and images under ``destination`` and return what happened.

    Broken annotations are left out and reported; so is an image that cannot be used, or all of whose objects
    are broken. ``strict`` raises DataError for any of them before anything is written. ``link_images`` makes
    hard links instead of copies where the file system can. ``seed`` splits sources that name no splits.
    ``progress`` gets (done, total) images. Raises DataError for an unknown ``kind``, a source that is not of
    that kind or holds nothing usable, or a destination that is in use.
    """
    if kind not in _READERS:
        raise DataError(f"data import: got kind {kind!r}, expected one of {', '.join(_READERS)}")
    source_folder, folder = Path(source), Path(destination)
    if not source_folder.is_dir():
        raise DataError(f"{source_folder}: no such folder, expected a {kind} data set; check the path")
    check_replaceable(folder, MAKER)
    content = _READERS[kind](source_folder, seed=seed)
    checked, found = _check_all(content.images, progress)
    problems = [*content.problems, *found]
    if strict and problems:
        raise DataError(_refusal(source_folder, "broken annotations", problems))
    if not checked:
        raise DataError(_refusal(source_folder, "no usable image among broken annotations", problems))
    arguments = {"kind": kind, "strict": strict, "seed": seed}
    with staged_folder(folder, MAKER, arguments) as staging:
        splits = _write_splits(staging, checked, link_images)
    return _summarise(folder, content, splits, problems)


def _refusal(source: Path, what: str, problems: Sequence[ImportProblem]) -> str:
    lines = list_problems(problems)
    return "\n".join([f"{source}: {what}: {len(problems)} problems; nothing was written", *lines])


def _check_all(
    images: Sequence[PixelImage], progress: Progress | None
) -> tuple[list[_Checked], list[ImportProblem]]:
    checked: list[_Checked] = []
    problems: list[ImportProblem] = []
    seen: set[tuple[str, str]] = set()
    for number, image in enumerate(images, start=1):
        try:
            _check_identity(image, seen)
            size = picture_size(image.image_file, image.size)
        except AnnotationProblem as exc:
            problems.append(_problem(image, "image", exc))
        else:
            objects, found = _convert_all(image, size)
            problems.extend(found)
            if objects or not (found or image.num_broken):
                checked.append(_Checked(image=image, size=size, objects=objects))
        if progress:
            progress(number, len(images))
    return checked, problems


def _check_identity(image: PixelImage, seen: set[tuple[str, str]]) -> None:
    key = (image.split, image.sample_id)
    if key in seen:
        raise AnnotationProblem("duplicate", f"sample {image.sample_id!r} is in {image.split} already")
    if len(image.sample_id) > MAX_ID_CHARS:
        raise AnnotationProblem("name", f"image name longer than {MAX_ID_CHARS} characters; rename it")
    seen.add(key)


def _convert_all(
    image: PixelImage, size: tuple[int, int]
) -> tuple[tuple[GroundTruthObject, ...], list[ImportProblem]]:
    objects: list[GroundTruthObject] = []
    problems: list[ImportProblem] = []
    for item in image.objects:
        try:
            objects.append(convert_object(item, *size))
        except AnnotationProblem as exc:
            problems.append(_problem(image, item.item, exc))
    return tuple(objects), problems


def _problem(image: PixelImage, item: str, exc: AnnotationProblem) -> ImportProblem:
    return ImportProblem(
        file=image.annotation, item=f"{item} of {image.sample_id}", kind=exc.kind, reason=str(exc)
    )


def _write_splits(folder: Path, checked: Sequence[_Checked], link_images: bool) -> dict[str, SplitCount]:
    samples: dict[str, list[DraftSample]] = defaultdict(list)
    for entry in checked:
        path = Path("images") / entry.image.target_path
        _place_image(entry.image.image_file, folder / path, link_images)
        samples[entry.image.split].append(
            DraftSample(
                image_path=path.as_posix(),
                width=entry.size[0],
                height=entry.size[1],
                objects=entry.objects,
                sample_id=entry.image.sample_id,
            )
        )
    counts: dict[str, SplitCount] = {}
    for split, lines in samples.items():
        num_images = write_split(folder / f"{split}.jsonl", lines)
        num_objects = sum(len(sample.objects) for sample in lines)
        counts[split] = SplitCount(num_images=num_images, num_objects=num_objects)
    return counts


def _place_image(source: Path, target: Path, link_images: bool) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link_images:
        try:
            os.link(source, target)
        except OSError:
            pass  # another file system, or one without hard links: a copy does the same
        else:
            return
    shutil.copyfile(source, target)


def _summarise(
    folder: Path, content: SourceContent, splits: dict[str, SplitCount], problems: Sequence[ImportProblem]
) -> ImportSummary:
    num_images = len(content.images) + content.num_images_unreadable
    num_objects = sum(len(image.objects) + image.num_broken for image in content.images)
    return ImportSummary(
        folder=folder,
        splits=splits,
        num_images_left_out=num_images - sum(count.num_images for count in splits.values()),
        num_objects_left_out=num_objects - sum(count.num_objects for count in splits.values()),
        problems=tuple(problems),
    )
