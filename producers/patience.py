"""Decides whose fault a failed request is, and how long a producer then waits. Pure.

A full disk, a server that refuses, weights nobody can read: an accident costs time, not rollouts.
"""

from __future__ import annotations

from typing import Final

from broker_schemas.errors import BrokerError, DeadlinePassed, RolloutServerError, ServerRefused

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0


def is_accident(error: BaseException) -> bool:
    """Return whether an error speaks of the place, not of the request: others would fail as well."""
    if isinstance(error, ServerRefused):
        return False
    return isinstance(error, BrokerError | DeadlinePassed | RolloutServerError | OSError)


class Patience:
    """Pauses of one thing that is tried again: 0.5 s doubling to 30 s, anew once it worked."""

    def __init__(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        self._failed: set[str] = set()

    def failed(self, request_id: str, *, is_accident: bool) -> float | None:
        """Return how long to wait, None where the request itself is to blame.

        It is where it alone has failed since one worked; from the second one on, failing is the rule here.
        """
        self._failed.add(request_id)
        if not is_accident and len(self._failed) < 2:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def worked(self) -> None:
        """Begin anew."""
        self._pause_s = FIRST_PAUSE_S
        self._failed.clear()


class FailureBrake:
    """Slows the dispatcher down while failures are the rule: most of what ended lately ended badly.

    Sums only rise; ``may_issue`` and ``observe`` take the same monotonic clock.
    """

    LEAST_ENDED: Final = 8

    def __init__(self) -> None:
        self._good = self._bad = -1
        self._pause_s = 0.0
        self._next_s = 0.0

    def observe(self, num_good: int, num_bad: int, now_s: float) -> bool:
        """Take in how many rollouts ended well and badly so far; return whether braking began or ended."""
        if self._good < 0:
            self._good, self._bad = num_good, num_bad
        good, bad = num_good - self._good, num_bad - self._bad
        if good + bad < self.LEAST_ENDED:
            return False
        self._good, self._bad = num_good, num_bad
        was_braking = self.is_braking
        if bad > good:
            self._pause_s = min(2 * self._pause_s or 1.0, LONGEST_PAUSE_S)
            self._next_s = now_s + self._pause_s
        else:
            self._pause_s = 0.0
        return was_braking != self.is_braking

    @property
    def is_braking(self) -> bool:
        return self._pause_s > 0

    def may_issue(self, now_s: float) -> bool:
        """Return whether it is time to ask for more; while braking that is once in a pause."""
        if not self.is_braking:
            return True
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._pause_s
        return True
