"""Keeps count of what stands in RQ's keys and is no job of ours. Knows no RQ."""

from __future__ import annotations

import logging
from typing import Final, Protocol

log = logging.getLogger(__name__)
NAMES_KEPT: Final = 1000


class CountsBrokenJobs(Protocol):
    """Metrics of whoever reads the queue."""

    def on_broken_job(self) -> None:
        """One more entry is no job."""
        ...


class BrokenJobs:
    """Counts broken entries in ``metrics``, where there are some, and names each in the log once."""

    def __init__(self, metrics: CountsBrokenJobs | None = None) -> None:
        self._metrics = metrics
        self._named: set[bytes] = set()

    def note(self, where: str, entry: bytes, why: str) -> None:
        """Take note of ``entry``, found in ``where``, which is passed over."""
        shown = entry[:80]
        if shown in self._named:
            return
        if self._metrics is not None:
            self._metrics.on_broken_job()
        log.error("job %r in %s is passed over: %.200s", shown, where, why)
        if len(self._named) < NAMES_KEPT:
            self._named.add(shown)
