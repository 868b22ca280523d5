"""The loop of every role that serves the queue: step until asked to stop, wait for a broker that is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.errors import BrokerError, BrokerRefused

log = logging.getLogger(__name__)
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


def keep_stepping(
    step: Callable[[], object],
    stop: threading.Event,
    *,
    role: str,
    pause_s: float = 0.0,
    on_trouble: Callable[[], None] = lambda: None,
) -> None:
    """Call ``step`` until ``stop`` is set, ``pause_s`` apart (0: it blocks by itself).

    A BrokerError is waited out with backoff, 0.1 s doubling to 5 s, and logged when it begins and when it is
    over; any other error ends the role, and so does BrokerRefused: asking again would not help.
    ``on_trouble`` is told of each BrokerError.
    """
    trouble_pause_s, trouble = FIRST_PAUSE_S, TroubleLog(log, role)
    while not stop.is_set():
        try:
            step()
        except BrokerRefused:
            raise
        except BrokerError as exc:
            trouble.on_trouble(exc)
            on_trouble()
            stop.wait(trouble_pause_s)
            trouble_pause_s = min(2 * trouble_pause_s, LONGEST_PAUSE_S)
            continue
        trouble.on_well()
        trouble_pause_s = FIRST_PAUSE_S
        if pause_s:
            stop.wait(pause_s)
