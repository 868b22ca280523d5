"""Finds the picture that an annotation means: by its path, else by its name anywhere in the data set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote

from rollstream.datasets.importing.drafts import AnnotationProblem

PICTURE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm"),
    *(".heic", ".heif", ".avif", ".jp2"),
)


def tidy_path(stated: str) -> PurePosixPath:
    """Return a path as another program wrote it with forward slashes and without drive or scheme."""
    text = stated.strip().replace("\\", "/")
    text = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", text)
    return PurePosixPath(re.sub(r"^[A-Za-z]:", "", text))


class PictureIndex:
    """Every picture below ``root`` by name; links are followed as far as the file system's owner set them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file():
                path = PurePosixPath(file.relative_to(root).as_posix())
                self._by_name[path.name.lower()].append(path)
                self._by_stem[path.stem.lower()].append(path)

    def paths(self) -> list[PurePosixPath]:
        """Return every picture, relative to the root, in path order."""
        return sorted(path for paths in self._by_name.values() for path in paths)

    def file(self, path: PurePosixPath) -> Path:
        return self.root / path

    def find(self, stated: str, near: PurePosixPath, stem: str = "") -> PurePosixPath:
        """Return the picture that ``stated`` means in an annotation at ``near``, relative to the root.

        Of several of one name it is the one whose folders fit best: those stated, then those of ``near``.
        ``stem`` is tried where nothing has the stated name. Raises AnnotationProblem for none, or for
        several that fit alike.
        """
        wanted = tidy_path(stated) if stated else PurePosixPath(stem)
        names = [wanted.name.lower(), unquote(wanted.name).lower()]
        found = next((self._by_name[name] for name in names if name in self._by_name), [])
        found = found or self._by_stem.get(wanted.stem.lower(), []) or self._by_stem.get(stem.lower(), [])
        if not found:
            raise AnnotationProblem("no image", f"got no image {stated or stem} in {self.root}, expected one")
        return _best(found, wanted, near, self.root)


def _best(
    found: Sequence[PurePosixPath], wanted: PurePosixPath, near: PurePosixPath, root: Path
) -> PurePosixPath:
    ranked = sorted(((_shared_tail(path, wanted), _shared_folders(path, near)), path) for path in found)
    if len(ranked) > 1 and ranked[-1][0] == ranked[-2][0]:
        raise AnnotationProblem(
            "no image",
            f"got two images {wanted.name} in {root} that fit alike, {ranked[-2][1]} and {ranked[-1][1]}; "
            "rename one",
        )
    return ranked[-1][1]


def _shared_tail(path: PurePosixPath, wanted: PurePosixPath) -> int:
    """Count the folders, from the file outwards, that both paths name alike."""
    count = 0
    for ours, theirs in zip(reversed(path.parent.parts), reversed(wanted.parent.parts), strict=False):
        if ours.lower() != theirs.lower():
            break
        count += 1
    return count


def _shared_folders(path: PurePosixPath, near: PurePosixPath) -> int:
    ours = {part.lower() for part in path.parent.parts}
    return len(ours & {part.lower() for part in near.parent.parts})
