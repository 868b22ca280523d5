"""Checksums of a folder's files, written beside them last and checked before any of them is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from broker_schemas.errors import RunStopped
from learner.tensor_files import WrittenFile

CHECKSUMS_FILE: Final = "checksums.json"
_REMEDY: Final = "remove this checkpoint to resume from the one before, or restore it from a copy"


def write_checksums(folder: Path, known: Mapping[str, WrittenFile]) -> None:
    """Write size and SHA-256 of every file below ``folder`` into it; raises OSError.

    ``known`` are those that were taken while a file was written.
    """
    found = {
        name: asdict(known.get(name) or _measured(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) != CHECKSUMS_FILE
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def verify_checksums(folder: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Raise RunStopped naming the first file that is missing or not as it was written.

    Contents are checked of this rank's share of the bytes, so that ``world_size`` ranks together check all.
    A folder of an older rollstream, without checksums, passes. A file that was added later is not looked at.
    """
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return
    try:
        expected = {
            str(name): (int(entry["size_bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RunStopped(f"{path}: not a list of checksums ({exc!r}); {_REMEDY}") from exc
    mine = _share({name: size for name, (size, _) in expected.items()}, rank, world_size)
    for name, (size_bytes, sha256) in expected.items():
        file = folder / name
        if not file.is_file():
            raise RunStopped(f"{file}: missing, expected a file of {size_bytes} bytes; {_REMEDY}")
        got = file.stat().st_size
        if got != size_bytes:
            raise RunStopped(f"{file}: got {got} bytes, expected {size_bytes}; {_REMEDY}")
        if name in mine and _digest(file) != sha256:
            raise RunStopped(f"{file}: damaged, its checksum is another than when it was written; {_REMEDY}")


def _share(sizes: Mapping[str, int], rank: int, world_size: int) -> set[str]:
    """Return the files of one rank, largest first to whoever has least."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    filled = [0] * world_size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += sizes[name]
    return set(shares[rank])


def _measured(path: Path) -> WrittenFile:
    return WrittenFile(size_bytes=path.stat().st_size, sha256=_digest(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
