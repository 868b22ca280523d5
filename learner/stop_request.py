"""A request to stop after the current step, from a signal or from the wiring."""

from __future__ import annotations

import signal
import threading


class StopRequest:
    """Set once, read by the loop between steps; ``wait`` is the loop's only pause.

    ``signal_number`` is the first signal that asked, None for none.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_number: int | None = None

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask for a stop."""
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Return after ``seconds``, or as soon as a stop is asked for."""
        self._event.wait(seconds)

    def follow_signals(self) -> None:
        """Let SIGTERM and SIGINT ask for a stop; a second one of either kind ends the process as usual."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signal_number = self.signal_number or number
        self._event.set()
        signal.signal(number, signal.SIG_DFL)
