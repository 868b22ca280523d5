"""Says trouble once when it begins, once when it changes its kind and once when it is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class TroubleLog:
    """The trouble of one thing that is tried again and again; ``what`` begins each of its lines."""

    def __init__(
        self, log: logging.Logger, what: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._what = what
        self._clock = clock
        self._kind = ""
        self._since_s = 0.0
        self.num_tries = 0

    def on_trouble(self, error: BaseException) -> None:
        """Note a try that failed; the first of its kind in a row is logged."""
        if not self.num_tries:
            self._since_s = self._clock()
        self.num_tries += 1
        if type(error).__name__ != self._kind:
            self._kind = type(error).__name__
            self._log.warning("%s: %s; trying again", self._what, error)

    def on_well(self) -> None:
        """Note a try that worked; after trouble that is logged, with how long it lasted."""
        if self.num_tries:
            lasted_s = self._clock() - self._since_s
            self._log.info(
                "%s: works again after %.1f s and %d failed tries", self._what, lasted_s, self.num_tries
            )
        self._kind, self.num_tries = "", 0


class RoundCounts:
    """Which of many events of a kind deserve a line: the first, the tenth, the hundredth and so on."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def due(self, kind: str) -> int:
        """Count an event of ``kind``; return how many there were where that is a round number, else 0."""
        number = self._counts[kind] = self._counts.get(kind, 0) + 1
        return number if str(number).strip("0") == "1" else 0
