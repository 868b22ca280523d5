"""Imports a foreign data set: read, check and convert everything, and only then write.

A first pass touches nothing but its own memory, so a refused import leaves no trace; the second writes
pictures and splits into a folder that appears whole or not at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from broker_schemas.errors import DataError
from broker_schemas.records.records import MAX_ID_CHARS, GroundTruthObject
from rollstream.datasets.importing.coco import read_coco
from rollstream.datasets.importing.conversion import convert_object
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    MaskMode,
    PixelImage,
    PixelObject,
    ReadOptions,
    SourceContent,
)
from rollstream.datasets.importing.labelme import read_labelme
from rollstream.datasets.importing.picture_check import (
    Picture,
    examine_picture,
    place_picture,
    target_name,
    turn_box,
    turn_points,
)
from rollstream.datasets.importing.qwen import read_qwen
from rollstream.datasets.importing.report import ImportProblem, ImportSummary, SplitCount, list_problems
from rollstream.datasets.importing.voc import read_voc
from rollstream.datasets.importing.writer import DraftSample, write_split
from rollstream.datasets.importing.yolo import read_yolo
from rollstream.staged_folder import check_replaceable, staged_folder

# a list of thirty boxes takes some 400 tokens
HUGE_NUM_COORDINATES: Final = 2000
MAKER: Final = "data import"
Kind = Literal["voc", "coco", "labelme", "yolo", "qwen"]
Progress = Callable[[int, int], None]
SIMPLIFY_BINS: Final = 1.0
_READERS: Final[dict[str, Callable[[Path, ReadOptions], SourceContent]]] = {
    "voc": read_voc,
    "coco": read_coco,
    "labelme": read_labelme,
    "yolo": read_yolo,
    "qwen": read_qwen,
}
_ALSO_FILES: Final = ("coco", "qwen")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    image: PixelImage
    picture: Picture
    target_path: str
    objects: tuple[GroundTruthObject, ...]


@dataclass(kw_only=True)
class _Pass:
    """What the first pass gathers."""

    checked: list[_Checked] = field(default_factory=list)
    problems: list[ImportProblem] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    seen: set[tuple[str, str]] = field(default_factory=set)
    places: dict[str, Path | bytes] = field(default_factory=dict)


def import_dataset(
    kind: Kind,
    source: str | Path,
    destination: str | Path,
    *,
    strict: bool = False,
    link_images: bool = False,
    seed: int = 0,
    val_share: float = 0.1,
    resplit: bool = False,
    group_by: Literal["file", "folder"] = "file",
    masks: MaskMode = "outline",
    simplify_bins: float = SIMPLIFY_BINS,
    base: Literal[0, 1] | None = None,
    coordinates: Literal["pixels", "thousandths"] | None = None,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write ``source`` as JSONL splits and images under ``destination`` and return what happened.

    Shapes that overshoot the frame are clipped; pictures are written upright and in 8 bits; polygons lose
    vertices that move them by less than ``simplify_bins`` (0 keeps all). Broken annotations are left out and
    reported; so is an image that cannot be used, or all of whose objects are broken. ``strict`` raises
    DataError for any of them before anything is written. ``link_images`` makes hard links instead of copies
    where the file system can. The other options are those of ReadOptions. ``progress`` gets (done, total)
    images. Raises DataError for an unknown ``kind``, a source that is not of that kind or holds nothing
    usable, a destination that is in use or cannot be written.
    """
    options = ReadOptions(
        seed=seed,
        val_share=val_share,
        is_resplit=resplit,
        group_by=group_by,
        masks=masks,
        base=base,
        coordinates=coordinates,
    )
    source_path, folder = Path(source), Path(destination)
    _check_request(kind, source_path, folder, options)
    content = _READERS[kind](source_path, options)
    first = _check_all(content.images, simplify_bins, progress)
    problems = [*content.problems, *first.problems]
    if strict and problems:
        raise DataError(_refusal(source_path, "broken annotations", problems))
    if not first.checked:
        raise DataError(_refusal(source_path, "no usable image among broken annotations", problems))
    arguments = {"kind": kind, "strict": strict, "simplify_bins": simplify_bins, **asdict(options)}
    splits = _write(folder, arguments, first.checked, link_images)
    return _summarise(folder, content, first, splits, problems)


def _check_request(kind: str, source: Path, folder: Path, options: ReadOptions) -> None:
    if kind not in _READERS:
        raise DataError(f"data import: got kind {kind!r}, expected one of {', '.join(_READERS)}")
    if not source.is_dir() and not (kind in _ALSO_FILES and source.is_file()):
        raise DataError(f"{source}: no such folder, expected a {kind} data set; check the path")
    if not 0 <= options.val_share < 1:
        raise DataError(f"validation share: got {options.val_share}, expected 0 or more and under 1")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"{folder}: lies inside the source {source}, whose pictures a second import would find twice; "
            "choose a folder outside it"
        )
    check_replaceable(folder, MAKER)


def _refusal(source: Path, what: str, problems: Sequence[ImportProblem]) -> str:
    lines = list_problems(problems)
    return "\n".join([f"{source}: {what}: {len(problems)} problems; nothing was written", *lines])


def _check_all(images: Sequence[PixelImage], simplify_bins: float, progress: Progress | None) -> _Pass:
    first = _Pass()
    for number, image in enumerate(images, start=1):
        try:
            _check_identity(image, first.seen)
            picture = examine_picture(image.picture, image.size)
        except AnnotationProblem as exc:
            first.problems.append(_problem(image, "image", exc))
        else:
            _keep(image, picture, simplify_bins, first)
        if progress:
            progress(number, len(images))
    return first


def _keep(image: PixelImage, picture: Picture, simplify_bins: float, first: _Pass) -> None:
    """Convert the objects of ``image`` and keep it, unless all of them are broken."""
    objects: list[GroundTruthObject] = []
    changes: Counter[str] = Counter()
    broken: list[ImportProblem] = []
    for item in image.objects:
        try:
            points = _shown_points(item, image, picture)
            moved = PixelObject(**{**vars(item), "points": points})
            converted = convert_object(moved, *picture.size, simplify_bins)
        except AnnotationProblem as exc:
            broken.append(_problem(image, item.item, exc))
        else:
            objects.append(converted.item)
            changes.update(converted.changes)
    first.problems += broken
    if not objects and (broken or image.num_broken):
        return
    if picture.is_turned:
        changes["pictures turned upright"] += 1
    if picture.is_deep:
        changes["pictures scaled to 8 bits"] += 1
    first.changes += changes
    target = _free_place(target_name(image.target_path, picture), image.picture, first.places)
    first.checked.append(_Checked(image=image, picture=picture, target_path=target, objects=tuple(objects)))


def _shown_points(item: PixelObject, image: PixelImage, picture: Picture) -> tuple[float, ...]:
    """Return the object's points in pixels of the picture as it is shown."""
    if image.is_normalised:
        return tuple(value * picture.size[index % 2] for index, value in enumerate(item.points))
    if not picture.are_points_stored:
        return item.points
    turn = turn_box if item.geometry == "bbox_2d" else turn_points
    return turn(item.points, picture.orientation, picture.size, 1.0 if image.are_pixel_centres else 0.0)


def _free_place(path: str, source: Path | bytes, places: dict[str, Path | bytes]) -> str:
    """Return ``path``, or another name where a different picture has it already."""
    wanted, number = path, 1
    while places.setdefault(wanted, source) != source:
        number += 1
        pure = PurePosixPath(path)
        wanted = pure.with_name(f"{pure.stem}-{number}{pure.suffix}").as_posix()
    return wanted


def _check_identity(image: PixelImage, seen: set[tuple[str, str]]) -> None:
    key = (image.split, image.sample_id)
    if key in seen:
        raise AnnotationProblem("duplicate", f"sample {image.sample_id!r} is in {image.split} already")
    if len(image.sample_id) > MAX_ID_CHARS:
        raise AnnotationProblem("name", f"image name longer than {MAX_ID_CHARS} characters; rename it")
    seen.add(key)


def _problem(image: PixelImage, item: str, exc: AnnotationProblem) -> ImportProblem:
    return ImportProblem(
        file=image.annotation, item=f"{item} of {image.sample_id}", kind=exc.kind, reason=str(exc)
    )


def _write(
    folder: Path, arguments: dict[str, Any], checked: Sequence[_Checked], is_linked: bool
) -> dict[str, SplitCount]:
    try:
        with staged_folder(folder, MAKER, arguments) as staging:
            return _write_splits(staging, checked, is_linked)
    except OSError as exc:
        raise DataError(
            f"{folder}: cannot be written ({exc.strerror or exc}); free some space, or choose another folder"
        ) from exc


def _write_splits(folder: Path, checked: Sequence[_Checked], is_linked: bool) -> dict[str, SplitCount]:
    samples: dict[str, list[DraftSample]] = defaultdict(list)
    for entry in checked:
        path = Path("images") / entry.target_path
        if not (folder / path).exists():
            place_picture(entry.image.picture, folder / path, entry.picture, is_linked=is_linked)
        samples[entry.image.split].append(
            DraftSample(
                image_path=path.as_posix(),
                width=entry.picture.size[0],
                height=entry.picture.size[1],
                objects=entry.objects,
                sample_id=entry.image.sample_id,
            )
        )
    counts: dict[str, SplitCount] = {}
    for split, lines in samples.items():
        num_images = write_split(folder / f"{split}.jsonl", lines)
        classes = Counter(item.desc for sample in lines for item in sample.objects)
        counts[split] = SplitCount(
            num_images=num_images, num_objects=classes.total(), objects_by_class=dict(classes)
        )
    return counts


def _summarise(
    folder: Path,
    content: SourceContent,
    first: _Pass,
    splits: dict[str, SplitCount],
    problems: Sequence[ImportProblem],
) -> ImportSummary:
    num_images = len(content.images) + content.num_images_unreadable
    num_objects = sum(len(image.objects) + image.num_broken for image in content.images)
    num_objects += content.num_objects_unreadable
    kept = {id(entry.image): entry for entry in first.checked}
    on_kept = sum(len(entry.image.objects) + entry.image.num_broken for entry in kept.values())
    num_written = sum(count.num_objects for count in splits.values())
    return ImportSummary(
        folder=folder,
        splits=splits,
        num_images_left_out=num_images - sum(count.num_images for count in splits.values()),
        num_objects_left_out=num_objects - num_written,
        num_objects_of_left_out_images=num_objects - on_kept,
        changes=dict(first.changes),
        notes=(*content.notes, *_huge_samples(first.checked)),
        problems=tuple(problems),
    )


def _huge_samples(checked: Sequence[_Checked]) -> list[str]:
    """Return a sentence about samples whose shapes alone fill a model's context; each number is a token."""
    sizes = [
        (sum(len(item.bins) for item in entry.objects), len(entry.objects), entry.image.sample_id)
        for entry in checked
    ]
    huge = [size for size in sizes if size[0] > HUGE_NUM_COORDINATES]
    if not huge:
        return []
    numbers, objects, name = max(huge)
    return [
        f"{len(huge)} samples hold more than {HUGE_NUM_COORDINATES} coordinates, a token each; {name} holds "
        f"{numbers} for {objects} objects. Such samples are slow or too long to train: import with "
        "--simplify 3, or with --masks hull or box"
    ]
