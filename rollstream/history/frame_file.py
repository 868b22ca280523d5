"""Appends frames to a file: whole or not at all, on disk before it returns, never to one that was moved."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from broker_schemas.errors import RunStopped
from rollstream.history.frames import Damage, Frame, TornEnd, encode_frame, scan_frames

log = logging.getLogger(__name__)


class FrameFile:
    """One file, open for appending. A torn end is cut off and said; damage is said and left as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        whole = 0
        for item in scan_frames(path):
            if isinstance(item, Frame):
                whole = item.end
            elif isinstance(item, Damage):
                log.error("archive: %s; `rollstream audit` fails from now on", item)
                whole = item.end
            elif isinstance(item, TornEnd):
                log.warning(
                    "archive: %s: cut off bytes %d to %d, a frame that its writer did not finish",
                    *(path, item.start, item.end),
                )
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if os.fstat(self._handle).st_size > whole:
            os.ftruncate(self._handle, whole)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._handle).st_size

    def append(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        """Append the frames of ``bodies``, on disk when this returns.

        They go out in one write, so that the frames of a writer that was frozen cannot stand inside ours.
        Raises OSError when the disk refuses, with nothing appended; RunStopped when the file was moved.
        """
        self.check_in_place()
        if not bodies:
            return
        raw = b"".join(map(encode_frame, bodies))
        before = self.size_bytes
        try:
            written = os.write(self._handle, raw)
            if written < len(raw):
                raise OSError(f"the disk took {written} of {len(raw)} bytes")
            os.fsync(self._handle)
        except OSError as exc:
            if self.size_bytes > before:
                os.ftruncate(self._handle, before)
            raise OSError(f"{self._path}: cannot append {len(raw)} bytes ({exc})") from exc

    def check_in_place(self) -> None:
        """Raise RunStopped when the path no longer leads to the file that is open."""
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            named = None
        opened = os.fstat(self._handle)
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise RunStopped(
                f"{self._path}: moved, replaced or removed while it was written; put the run folder back "
                "where it was and start again: the log goes on from there"
            )

    def close(self) -> None:
        os.close(self._handle)
