"""Segments of a coming step, fetched by a thread while the one before it is trained; nothing is promised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from broker_schemas.records.records import MatchedSegment

LONGEST_WAIT_S: Final = 5.0


class FetchedAhead:
    """Holds one look ahead at a time. What it could not fetch, whoever needs it fetches then."""

    def __init__(self) -> None:
        self._found: dict[str, MatchedSegment] = {}
        self._thread: threading.Thread | None = None

    def start(self, fetch: Callable[[], Iterable[MatchedSegment]]) -> None:
        """Call ``fetch`` in a thread, unless the one before it still runs."""
        if self._thread is not None and self._thread.is_alive():
            return
        found: dict[str, MatchedSegment] = {}
        self._found = found

        def look() -> None:
            # whatever a look meets, a client that is closed under it too, the step itself will say
            with suppress(Exception):
                found.update((segment.record_id, segment) for segment in fetch())

        # a broker that does not answer must not hold up the end of the program
        self._thread = threading.Thread(target=look, name="fetch-ahead", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, MatchedSegment]:
        """Return what was found, by record id, each once; waits 5 s at most for a look that is under way."""
        if self._thread is not None:
            self._thread.join(timeout=LONGEST_WAIT_S)
            if self._thread.is_alive():
                return {}
        found, self._found = self._found, {}
        return found
