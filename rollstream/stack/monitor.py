"""Looks at the broker once a second and writes what it sees to the run folder.

Outlasts a broker that is away; it must not know what anybody concludes from a sample.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from broker_schemas.errors import BrokerError
from rollstream.run_folder import Row
from rollstream.watch.broker_watch import BrokerWatch, sample_of

log = logging.getLogger(__name__)
SAMPLE_EVERY_S: Final = 1.0


class Monitor:
    """Appends a sample a second, from a thread of its own: a hanging broker must not hold up the stack."""

    def __init__(
        self,
        watch: BrokerWatch,
        path: Path,
        roles: Callable[[], Sequence[Row]],
        *,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._watch = watch
        self._path = path
        self._roles = roles
        self._now_ms = now_ms
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)
        self._trouble = ""
        self.last_sample: Row = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write a last sample."""
        if self.end():
            self.step()

    def end(self) -> bool:
        """End the thread, also one that never started; return whether it has ended in good time."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10 * SAMPLE_EVERY_S)
        return not self._thread.is_alive()

    def step(self) -> None:
        """Write one sample; a broker or a disk that fails is reported once, and tried again next time."""
        try:
            self._append(self._look())
        except OSError as exc:
            self._report(f"{self._path}: cannot be written ({exc.strerror}); samples are lost meanwhile")

    def _look(self) -> Row:
        try:
            sample = self._watch.sample(self._roles(), time_ms=self._now_ms())
        except BrokerError as exc:
            self._report(str(exc))
            return sample_of(None, self._roles(), time_ms=self._now_ms(), trouble=str(exc))
        self._trouble = ""
        return sample

    def _append(self, sample: Row) -> None:
        self.last_sample = sample
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(sample) + "\n")

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.info("monitor: %s", trouble)
        self._trouble = trouble

    def _loop(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.step()
