"""Reads YOLO: a text file a picture, a line an object: class, then box or polygon in shares of the picture.

Pictures without a text file are background: they teach that nothing is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from broker_schemas.errors import DataError
from rollstream.datasets.importing.drafts import (
    AnnotationProblem,
    PixelImage,
    PixelObject,
    ReadOptions,
    SourceContent,
    annotation_number,
)
from rollstream.datasets.importing.picture_index import PictureIndex, tidy_path
from rollstream.datasets.importing.report import ImportProblem
from rollstream.datasets.importing.splits import choose_splits, folder_split

_NAME_FILES: Final = ("classes.txt", "obj.names", "names.txt", "labels.txt", "predefined_classes.txt")
_SPLIT_KEYS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class _Layout:
    names: dict[int, str]
    split_by_prefix: dict[str, str]
    split_by_picture: dict[PurePosixPath, str]


def read_yolo(source: Path, options: ReadOptions) -> SourceContent:
    """Return the content of a YOLO folder, in path order of its pictures.

    Class names come from ``data.yaml`` (or another YAML with ``names``), ``classes.txt`` or ``obj.names``.
    Labels lie beside the pictures, or in a ``labels`` folder as the pictures do in ``images``. Splits are
    those of the YAML or of list files, else of folders, else by ``options``. Raises DataError where no class
    names or no label file are.
    """
    layout = _read_layout(source)
    index = PictureIndex(source)
    labels = {
        PurePosixPath(file.relative_to(source).as_posix()): file
        for file in sorted(source.rglob("*.txt"))
        if file.name not in _NAME_FILES
    }
    pictures = index.paths()
    found = {path: _label_of(path, labels) for path in pictures}
    if not any(found.values()):
        raise DataError(
            f"{source}: no picture has a label file of its name (*.txt), expected a YOLO folder with images "
            "and labels; check the path"
        )
    splits = choose_splits({str(path): _own_split(path, layout) for path in pictures}, options)
    images: list[PixelImage] = []
    problems: list[ImportProblem] = []
    for path in pictures:
        label = found[path]
        image, broken = _read_image(index, path, label, splits[str(path)], layout.names)
        images.append(image)
        problems += broken
    problems += _orphans(labels, found)
    return SourceContent(images=tuple(images), problems=tuple(problems))


def _read_layout(source: Path) -> _Layout:
    names: dict[int, str] = {}
    prefixes: dict[str, str] = {}
    for file in sorted([*source.rglob("*.yaml"), *source.rglob("*.yml")]):
        content = _load_yaml(file)
        if isinstance(content, dict) and isinstance(content.get("names"), list | dict):
            names = names or _names_of(content["names"], file)
            prefixes |= _yaml_splits(content)
    for name in _NAME_FILES:
        for file in sorted(source.rglob(name)):
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            names = names or {index: line.strip() for index, line in enumerate(lines) if line.strip()}
    if not names:
        raise DataError(
            f"{source}: no class names, expected data.yaml with names, or classes.txt with one a line; "
            "add one of them"
        )
    return _Layout(names=names, split_by_prefix=prefixes, split_by_picture=_list_files(source))


def _load_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise DataError(f"{file}: not readable as YAML ({exc}); correct it") from exc


def _names_of(value: list[Any] | dict[Any, Any], file: Path) -> dict[int, str]:
    pairs = enumerate(value) if isinstance(value, list) else value.items()
    try:
        return {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError) as exc:
        raise DataError(f"{file}: names: got {value!r:.80}, expected a list or numbers with names") from exc


def _yaml_splits(content: dict[str, Any]) -> dict[str, str]:
    """Return which folders hold which split, as the tails that their paths must have."""
    found: dict[str, str] = {}
    for key, split in _SPLIT_KEYS.items():
        values = content.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and not value.endswith(".txt"):
                parts = [part for part in tidy_path(value).parts if part not in ("..", ".", "/")]
                found.setdefault("/".join(parts), split)
    return found


def _list_files(source: Path) -> dict[PurePosixPath, str]:
    """Return the split of each picture that ``train.txt``, ``val.txt`` or ``test.txt`` lists, by its tail."""
    found: dict[PurePosixPath, str] = {}
    for key, split in _SPLIT_KEYS.items():
        for file in sorted(source.glob(f"{key}.txt")):
            for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
                if line.strip():
                    parts = [part for part in tidy_path(line).parts if part not in ("..", ".", "/")]
                    found[PurePosixPath(*parts)] = split
    return found


def _own_split(path: PurePosixPath, layout: _Layout) -> str | None:
    for length in range(len(path.parts)):
        listed = layout.split_by_picture.get(PurePosixPath(*path.parts[length:]))
        if listed:
            return listed
    for listed_path, split in layout.split_by_picture.items():
        if listed_path.parts[-len(path.parts) :] == path.parts:
            return split
    folder = path.parent.as_posix()
    # a folder inside another one's is the narrower word
    for prefix, split in sorted(layout.split_by_prefix.items(), key=lambda item: -item[0].count("/")):
        if prefix and (f"{folder}/".startswith(f"{prefix}/") or f"/{prefix}/".endswith(f"/{folder}/")):
            return split
    return folder_split(path)


def _label_of(path: PurePosixPath, labels: dict[PurePosixPath, Path]) -> Path | None:
    """Return the text file of a picture: ``images`` in its path read as ``labels``, else beside it."""
    parts = list(path.parts)
    for place in reversed([number for number, part in enumerate(parts[:-1]) if part == "images"]):
        swapped = PurePosixPath(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
        if swapped in labels:
            return labels[swapped]
    beside = path.with_suffix(".txt")
    return labels.get(beside) or labels.get(PurePosixPath("labels") / beside.name)


def _orphans(
    labels: dict[PurePosixPath, Path], found: dict[PurePosixPath, Path | None]
) -> list[ImportProblem]:
    """Return a problem for each label file in a folder of labels whose picture is missing."""
    used = {file for file in found.values() if file is not None}
    folders = {file.parent for file in used}
    return [
        ImportProblem(
            file=str(file), item="image", kind="no image", reason="no picture has this label file's name"
        )
        for file in labels.values()
        if file not in used and file.parent in folders and file.stem not in _SPLIT_KEYS
    ]


def _read_image(
    index: PictureIndex, path: PurePosixPath, label: Path | None, split: str, names: dict[int, str]
) -> tuple[PixelImage, list[ImportProblem]]:
    objects: list[PixelObject] = []
    problems: list[ImportProblem] = []
    text = label.read_text(encoding="utf-8-sig", errors="replace") if label else ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            objects.append(_read_line(line.split(), f"line {number}", names))
        except AnnotationProblem as exc:
            problems.append(
                ImportProblem(file=str(label), item=f"line {number}", kind=exc.kind, reason=str(exc))
            )
    image = PixelImage(
        split=split,
        annotation=str(label or index.file(path)),
        picture=index.file(path),
        target_path=path.as_posix(),
        sample_id=path.with_suffix("").as_posix(),
        size=None,
        objects=tuple(objects),
        num_broken=len(problems),
        is_normalised=True,
    )
    return image, problems


def _read_line(words: list[str], item: str, names: dict[int, str]) -> PixelObject:
    number = annotation_number(words[0], "class")
    desc = names.get(int(number), "") if number == int(number) else ""
    if not desc:
        raise AnnotationProblem("label", f"class {words[0]!r:.40} has no name, expected 0 to {max(names)}")
    values = [annotation_number(word, f"number {index}") for index, word in enumerate(words[1:], start=1)]
    if len(values) in (4, 5):  # a fifth is the confidence of a prediction
        x, y, width, height = values[:4]
        points = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return PixelObject(item=item, desc=desc, geometry="bbox_2d", points=points)
    if len(values) < 6 or len(values) % 2:
        raise AnnotationProblem(
            "segmentation", f"got {len(values)} numbers, expected 4 of a box or an even number of at least 6"
        )
    return PixelObject(item=item, desc=desc, geometry="poly", points=tuple(values))
