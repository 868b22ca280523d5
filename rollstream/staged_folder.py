"""Folders and files that appear whole or not at all; only its own maker may replace a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError

MARKER_NAME: Final = "made_by_rollstream.json"
READABLE: Final = 0o644


@contextmanager
def staged_folder(destination: Path, maker: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``destination`` when the block ends without an error.

    An existing ``destination`` is replaced only if it is empty or ``maker`` made it; anything else raises
    DataError before the block runs. The marker file records ``maker`` and ``arguments``.
    An error in the block leaves what was there untouched.
    """
    check_replaceable(destination, maker)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        staging.chmod(0o755)
        yield staging
        marker = {"made_by": maker, "arguments": dict(arguments)}
        (staging / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        for path in staging.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(READABLE)  # containers read it as another user; some writers of weights make 0600
        _swap(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(destination: Path, maker: str) -> None:
    """Raise DataError unless ``destination`` is absent, empty, or a folder that ``maker`` made."""
    if not destination.exists() or made_by(destination) == maker:
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    raise DataError(
        f"{destination}: got something that 'rollstream {maker}' did not make, expected a new folder, "
        "an empty one or its own; choose another folder or remove this one"
    )


def made_by(folder: Path) -> str | None:
    """Return the maker that the marker file of ``folder`` names; None without a readable marker."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return str(marker.get("made_by")) if isinstance(marker, dict) else None


def _swap(staging: Path, destination: Path) -> None:
    # rename cannot replace a folder that holds files: the old one steps aside first and comes back on failure
    if not destination.exists():
        staging.rename(destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
    old = destination.rename(aside / "old")
    try:
        staging.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text`` in UTF-8; the old content stays when writing fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.chmod(READABLE)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
