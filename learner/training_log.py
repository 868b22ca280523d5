"""JSON lines of steps and of evaluations, one flat map each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from broker_schemas.errors import RunStopped


class TrainingLog:
    """Appends to one log; written by rank 0 alone, each line flushed.

    A line that a killed process left unfinished is closed off and stays as it is. Steps that are repeated
    after a resume are written again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: IO[bytes] = path.open("ab")
        if _ends_inside_a_line(path):
            self._file.write(b"\n")

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append ``row``, one flat map with an ``optimizer_step``; raises RunStopped where it was moved."""
        self._check_in_place()
        self._file.write(json.dumps(dict(row), ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _check_in_place(self) -> None:
        opened = os.fstat(self._file.fileno())
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise RunStopped(
                f"{self._path}: moved, replaced or removed while the run wrote it; put the run folder back "
                "and start again: the run goes on from its last checkpoint"
            )

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends_inside_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        if stream.seek(0, 2) == 0:
            return False
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"
