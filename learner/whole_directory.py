"""A directory of files that is there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from broker_schemas.errors import RunStopped

STAGING_MARK: Final = ".writing-"
ASIDE_MARK: Final = ".replaced-"
READABLE: Final = 0o644


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yield an empty staging directory beside ``final``; on success
    it is synced to disk and renamed to ``final``.

    A ``final`` that exists is replaced. On an error the staging directory is removed and what was there
    before stays. Raises RunStopped naming path and remedy when the disk refuses.
    """
    staging = new_staging(final, _own_mark())
    try:
        with refusals_named(final):
            yield staging
        put_in_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def new_staging(final: Path, mark: str) -> Path:
    """Make an empty staging directory beside ``final``, which ``mark`` tells from those of other writers.

    Raises RunStopped when the disk refuses.
    """
    staging = final.parent / f"{STAGING_MARK}{final.name}{mark}"
    with refusals_named(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        staging.mkdir()
    return staging


def put_in_place(staging: Path, final: Path) -> None:
    """Bring a staging directory to the disk and rename it to ``final``; raises RunStopped."""
    with refusals_named(final):
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                path.chmod(READABLE)  # the weights are read by servers of other users; some writers make 0600
            _sync(path)
        _sync(staging)
        _move_into_place(staging, final)


@contextmanager
def refusals_named(final: Path) -> Iterator[None]:
    """Turn what a disk refuses into RunStopped that names ``final`` and the remedy."""
    try:
        yield
    except OSError as exc:
        raise RunStopped(
            f"{final}: cannot be written ({exc.strerror or exc}); what was there before is untouched, "
            "free some space and resume"
        ) from exc


def remove_leftovers(parent: Path) -> None:
    """Remove what writers that were killed have left in ``parent``; what cannot be removed is passed by."""
    for mark in (STAGING_MARK, ASIDE_MARK):
        for path in parent.glob(f"{mark}*"):
            _remove(path)


def numbered_directories(parent: Path, prefix: str) -> list[tuple[int, Path]]:
    """Return (number, path) of the directories ``<prefix><number>``
    in ``parent``, lowest first; none if absent.
    """
    if not parent.is_dir():
        return []
    found = [
        (int(path.name.removeprefix(prefix)), path)
        for path in parent.iterdir()
        if path.is_dir() and path.name.startswith(prefix) and path.name.removeprefix(prefix).isdecimal()
    ]
    return sorted(found)


def keep_last(parent: Path, prefix: str, num_kept: int, *, also: int | None = None) -> list[Path]:
    """Remove all but the ``num_kept`` highest numbered directories
    and number ``also``; return what was removed.
    """
    older = numbered_directories(parent, prefix)[: -max(num_kept, 1)]
    removed = [path for number, path in older if number != also]
    for path in removed:
        # renamed first: a reader sees the directory whole or not at all; one too many ends no run
        aside = _aside(path)
        with suppress(OSError):
            path.rename(aside)
            _remove(aside)
    return removed


def _move_into_place(staging: Path, final: Path) -> None:
    aside = _aside(final)
    if final.exists():
        final.rename(aside)
    try:
        staging.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    _sync(final.parent)
    _remove(aside)


def _aside(path: Path) -> Path:
    # a name of its own: what an earlier writer left under a fixed one may be in the way for ever
    return path.with_name(f"{ASIDE_MARK}{path.name}{_own_mark()}")


def _own_mark() -> str:
    return f"-{secrets.token_hex(4)}"


def _remove(path: Path) -> None:
    """Remove a file or a directory, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
