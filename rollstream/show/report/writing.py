"""Writes the report of a run beside it, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from rollstream.history.log_samples import LoggedRun
from rollstream.run_folder import RunFolder
from rollstream.show.report.gathering import build_report
from rollstream.show.report.page import render_html
from rollstream.staged_folder import write_atomically


def write_report(run_folder: RunFolder | Path, logged: LoggedRun | None = None) -> Path:
    """Write ``report.html`` into the run folder and return its path; ``logged`` as in ``build_report``.

    The page is written under another name and renamed: an old report stays until the new one is whole.
    """
    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder.existing(run_folder)
    write_atomically(folder.report, render_html(build_report(folder, logged)))
    return folder.report
