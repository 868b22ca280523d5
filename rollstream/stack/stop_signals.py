"""Signals to the stack: the first asks for an orderly end, the second ends everything at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

HANDLED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Handles the signals inside its ``with`` block; only in the main thread."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._num_received = 0
        self._arrived = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in HANDLED:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def pause(self, seconds: float) -> None:
        """Return after ``seconds``, or at once when the first signal has just arrived."""
        if self._arrived.wait(seconds):
            self._arrived.clear()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received == 1:
            self.first = signal.Signals(number)
            self._arrived.set()
        elif self._num_received == 2:
            raise KeyboardInterrupt
