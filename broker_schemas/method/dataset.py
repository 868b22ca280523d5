"""Data set records: one JSON line an image, checked as they are read.

Owns what a valid line is; it does not know how data sets are made or trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from broker_schemas.errors import DataError
from broker_schemas.method.images import absolute_root, confine_image_path, read_image_size
from broker_schemas.method.object_fields import ControlTokenProblem, FieldProblem, read_object
from broker_schemas.records.records import MAX_ID_CHARS, GroundTruthObject

Ordering = Literal["sorted", "dataset", "random"]
ORDERINGS: Final[tuple[Ordering, ...]] = ("sorted", "dataset", "random")
MAX_PROBLEMS: Final = 20
MAX_EXTENT_PIXELS: Final = 1 << 20
_RECORD_KEYS: Final = frozenset({"images", "width", "height", "objects", "metadata"})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image (or several) and its labelled objects.

    ``image_paths`` are relative to the data root, with forward slashes, as an ImageReference has them;
    ``image_files`` are the same as absolute paths. ``width`` and ``height`` are pixels of the stored image.
    ``objects`` stand in the order in which they are written. ``task`` is ``bbox``, ``poly``, ``mixed`` or
    ``empty`` by geometry, unless the metadata names one.
    """

    sample_id: str
    task: str
    image_paths: tuple[str, ...]
    image_files: tuple[Path, ...]
    width: int
    height: int
    objects: tuple[GroundTruthObject, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_dataset(
    jsonl_path: str | Path,
    *,
    root: str | Path | None = None,
    ordering: Ordering = "sorted",
    seed: int = 0,
    check_images: bool = False,
    passed_over: dict[str, str] | None = None,
) -> list[Sample]:
    """Return the samples of a JSONL file in file order; blank lines are skipped.

    Image paths are relative to the file and must stay inside ``root`` (default: the folder of the file).
    ``check_images`` opens each image's header and compares its size. Lines whose labels hold a control token
    go to ``passed_over`` (id to reason) where that is given.
    Raises DataError for a file that cannot be read or holds no sample, and for lines that break the format
    with up to 20 problems, each with file, line and field.
    """
    file = Path(jsonl_path)
    if ordering not in ORDERINGS:
        raise DataError(f"object ordering: got {ordering!r}, expected one of {', '.join(ORDERINGS)}")
    data_root = Path(root) if root is not None else file.parent
    samples: list[Sample] = []
    problems, line_by_id = list[str](), dict[str, int]()
    for line_number, line in _numbered_lines(file):
        where = f"{file}:{line_number}"
        try:
            sample = _read_line(line, file, line_number, data_root)
            if check_images:
                _check_images(sample)
        except ControlTokenProblem as exc:
            if passed_over is None:
                problems.append(f"{where}: {exc}")
            else:
                passed_over[_line_id(line, file, line_number)] = f"line {line_number}: {exc}"
            continue
        except (FieldProblem, DataError) as exc:
            problems.append(f"{where}: {exc}")
            continue
        first_line = line_by_id.setdefault(sample.sample_id, line_number)
        if first_line != line_number:
            problems.append(
                f"{where}: metadata.sample_id: got {sample.sample_id!r} again, expected each id once "
                f"(first in line {first_line})"
            )
        samples.append(sample)
    if problems:
        raise DataError(_problem_report(file, problems))
    if not samples and not passed_over:
        raise DataError(f"{file}: got no samples, expected one JSON record a line")
    return [_with_ordering(sample, ordering, seed) for sample in samples]


def order_objects(
    objects: Sequence[GroundTruthObject], ordering: Ordering, *, seed: int = 0, sample_id: str = ""
) -> tuple[GroundTruthObject, ...]:
    """Return ``objects`` in ``ordering``; ``random`` depends on ``seed`` and ``sample_id`` alone.

    ``sorted`` goes by the top edge of the object's extent, then its left edge; ties keep their order.
    """
    if ordering == "sorted":
        return tuple(sorted(objects, key=_top_left))
    if ordering == "random":
        shuffled = list(objects)
        random.Random(f"{seed}:{sample_id}").shuffle(shuffled)
        return tuple(shuffled)
    return tuple(objects)


def task_of(objects: Iterable[GroundTruthObject]) -> str:
    """Return ``bbox``, ``poly`` or ``mixed`` by geometry; ``empty`` for no objects."""
    geometries = {item.geometry for item in objects}
    if len(geometries) == 2:
        return "mixed"
    return {"bbox_2d": "bbox", "poly": "poly"}[geometries.pop()] if geometries else "empty"


def _top_left(item: GroundTruthObject) -> tuple[int, int]:
    return min(item.bins[1::2]), min(item.bins[0::2])


def _with_ordering(sample: Sample, ordering: Ordering, seed: int) -> Sample:
    objects = order_objects(sample.objects, ordering, seed=seed, sample_id=sample.sample_id)
    return Sample(**{**vars(sample), "objects": objects})


def _numbered_lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as exc:
        raise DataError(
            f"{file}: cannot be read ({exc.strerror or exc}), expected a JSONL data set; check the path, "
            "or make one with 'rollstream data import' or 'rollstream data scenes'"
        ) from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8 at byte {exc.start}; save it as UTF-8") from exc
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _problem_report(file: Path, problems: list[str]) -> str:
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "\n  ".join([f"{file}: {len(problems)} problems; correct these lines:", *shown])


def _read_line(line: str, file: Path, line_number: int, root: Path) -> Sample:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise FieldProblem(f"not JSON ({exc})") from exc
    if not isinstance(record, dict):
        raise FieldProblem(f"got {type(record).__name__}, expected a JSON object")
    foreign = sorted(record.keys() - _RECORD_KEYS)
    if foreign:
        raise FieldProblem(f"{foreign[0]}: unknown field, expected only {', '.join(sorted(_RECORD_KEYS))}")
    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FieldProblem(f"metadata: got {metadata!r:.80}, expected a map")
    files = _read_images(record, file.parent, root)
    objects = _read_objects(record)
    base = absolute_root(root)
    return Sample(
        sample_id=_read_label(metadata, "sample_id", f"{file.stem}-{line_number}"),
        task=_read_label(metadata, "task", task_of(objects)),
        image_paths=tuple(image.relative_to(base).as_posix() for image in files),
        image_files=files,
        width=_read_extent(record, "width"),
        height=_read_extent(record, "height"),
        objects=objects,
        metadata=metadata,
    )


def _read_images(record: Mapping[str, Any], folder: Path, root: Path) -> tuple[Path, ...]:
    paths = _required(record, "images")
    if not isinstance(paths, list) or not paths:
        raise FieldProblem(f"images: got {paths!r:.80}, expected a list of at least one path")
    files = []
    for index, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            raise FieldProblem(f"images[{index}]: got {path!r:.80}, expected a path relative to the file")
        try:
            files.append(confine_image_path(root, path, relative_to=folder))
        except DataError as exc:
            raise FieldProblem(f"images[{index}]: {exc}") from exc
    return tuple(files)


def _read_objects(record: Mapping[str, Any]) -> tuple[GroundTruthObject, ...]:
    values = _required(record, "objects")
    if not isinstance(values, list):
        raise FieldProblem(f"objects: got {values!r:.80}, expected a list")
    return tuple(read_object(value, f"objects[{index}]") for index, value in enumerate(values))


def _read_extent(record: Mapping[str, Any], name: str) -> int:
    value = _required(record, name)
    if type(value) is not int or not 1 <= value <= MAX_EXTENT_PIXELS:
        raise FieldProblem(f"{name}: got {value!r:.80}, expected pixels from 1 to {MAX_EXTENT_PIXELS}")
    return int(value)


def _read_label(metadata: Mapping[str, Any], name: str, default: str) -> str:
    value = metadata.get(name, default)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARS:
        raise FieldProblem(f"metadata.{name}: got {value!r:.80}, expected 1 to {MAX_ID_CHARS} characters")
    return value


def _line_id(line: str, file: Path, line_number: int) -> str:
    """Return the sample id of a line that is JSON, whatever else is wrong with it."""
    metadata = json.loads(line).get("metadata", {})
    return _read_label(metadata, "sample_id", f"{file.stem}-{line_number}")


def _required(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise FieldProblem(f"{name}: is missing")
    return record[name]


def _check_images(sample: Sample) -> None:
    for index, file in enumerate(sample.image_files):
        size = read_image_size(file)
        if size != (sample.width, sample.height):
            raise FieldProblem(
                f"images[{index}]: {file} has {size[0]}x{size[1]} pixels, "
                f"expected width {sample.width} and height {sample.height}"
            )
