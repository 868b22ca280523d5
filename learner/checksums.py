"""Checksums of a folder's files, written beside them last and checked before any of them is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from broker_schemas.errors import RunStopped

CHECKSUMS_FILE: Final = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write size and SHA-256 of every file below ``folder`` into it; raises OSError."""
    found = {
        path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS_FILE
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Raise RunStopped naming the first file that is missing or not as it was written.

    A folder of an older rollstream, without checksums, passes. A file that was added later is not looked at.
    """
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return
    remedy = "remove this checkpoint to resume from the one before, or restore it from a copy"
    try:
        expected = {
            str(name): (int(entry["size_bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RunStopped(f"{path}: not a list of checksums ({exc!r}); {remedy}") from exc
    for name, (size_bytes, sha256) in expected.items():
        file = folder / name
        if not file.is_file():
            raise RunStopped(f"{file}: missing, expected a file of {size_bytes} bytes; {remedy}")
        got = file.stat().st_size
        if got != size_bytes:
            raise RunStopped(f"{file}: got {got} bytes, expected {size_bytes}; {remedy}")
        if _digest(file) != sha256:
            raise RunStopped(f"{file}: damaged, its checksum is another than when it was written; {remedy}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
