"""Samples of a run's broker for whoever looks on, a second apart: a silent one is seen at once.

Hands its rows out as a reader of a file does; it must not know what they mean.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from broker_schemas.errors import BrokerError, BrokerRefused
from rollstream.history.log_samples import Row
from rollstream.run_folder import JsonLinesReader, RunFolder
from rollstream.show.report.counting import number
from rollstream.watch.bottleneck import roles
from rollstream.watch.broker_watch import BrokerWatch, Steps, sample_of
from rollstream.watch.presence import read_presence
from rollstream.watch.watched_run import WatchedRun

LOOK_EVERY_S: Final = 1.0
FRESH_MS: Final = 6_000
Look = Callable[[int], Row]


def now_ms() -> int:
    """Return the time as samples have it."""
    return int(time.time() * 1000)


class SupervisedRoles:
    """The roles as `rollstream up` tells them, with restarts and pauses, where it runs this run."""

    def __init__(self, folder: RunFolder) -> None:
        self._lines = JsonLinesReader(folder.stack_samples)
        self._last: Row = {}

    def read(self, time_ms: int) -> list[Row] | None:
        """Return the roles of its last sample; None where that is old, or where there is none."""
        rows = self._lines.read_new()
        self._last = rows[-1] if rows else self._last
        written_ms = number(self._last, "time_ms")
        if written_ms is None or time_ms - written_ms > FRESH_MS:
            return None
        return [dict(role) for role in roles(self._last)]


class BrokerFollower:
    """Looks once a second until ``stop``; what goes wrong is a row with ``broker_trouble``."""

    def __init__(self, look: Look, steps: Steps, *, now_ms: Callable[[], int] = now_ms) -> None:
        self._look = look
        self.steps = steps
        self._now_ms = now_ms
        self._rows: SimpleQueue[Row] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="broker-follower", daemon=True)

    def start(self) -> None:
        """Take the first look here, so that the first picture has it; then go on by itself.

        Raises BrokerRefused: looking again would not help.
        """
        self.step(refusal=BrokerRefused)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def step(self, refusal: type[BrokerError] | tuple[()] = ()) -> None:
        """Look once; what is of the kind ``refusal`` is raised."""
        try:
            self._rows.put(self._look(self._now_ms()))
        except refusal:
            raise
        except BrokerError as exc:
            # told with the time at which it is known: the look itself may have taken seconds
            self._rows.put(sample_of(None, [], time_ms=self._now_ms(), trouble=str(exc)))

    def read_new(self) -> list[Row]:
        """Return the rows since the last call, oldest first."""
        found = []
        while not self._rows.empty():
            found.append(self._rows.get())
        return found

    def _loop(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.step()


def follower_of(run: WatchedRun, supervised: SupervisedRoles) -> BrokerFollower:
    """Return what follows the broker of ``run``; raises BrokerRefused, ConfigError."""
    broker = run.broker()
    jobs = run.jobs(broker)
    watch = BrokerWatch(broker, run.world_size, is_own_server=run.is_own_server)
    max_steps = run.config.training.max_steps if run.config is not None else None
    has_rollouts = run.config is None or run.config.b_ratio > 0

    def look(time_ms: int) -> Row:
        sample = watch.sample([], time_ms=time_ms)
        if told := supervised.read(time_ms):
            return sample | {"roles": told}
        is_done = max_steps is not None and sample["optimizer_step"] >= max_steps
        return sample | {"roles": read_presence(broker, jobs, is_done=is_done, has_rollouts=has_rollouts)}

    return BrokerFollower(look, watch.steps)
