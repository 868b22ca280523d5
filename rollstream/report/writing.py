"""Writes the report of a run beside it, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rollstream.report.gathering import build_report
from rollstream.report.page import render_html
from rollstream.run_folder import RunFolder


def write_report(run_folder: RunFolder | Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    The page is written under another name and renamed: an old report stays until the new one is whole.
    """
    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder.existing(run_folder)
    write_atomically(folder.report, render_html(build_report(folder)))
    return folder.report


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text`` in UTF-8; the old content stays when writing fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
