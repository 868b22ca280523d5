"""Which samples are asked for again because their rollouts went stale, found in the log.

A slow rollout is a long one, more often than not: without this it would be lost to training for ever [Q-16].
A rollout's id names its position in the passes over the data set and its attempt, so nothing is kept apart.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.rollout_requests import RolloutRequest, read_stale_after
from broker_schemas.method.sampling import rollout_seed, sample_at
from broker_schemas.records.events import LogEvent

MAX_ATTEMPTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class StaleRollout:
    """A position whose rollout of ``attempt`` (from 1) went stale; ``place`` in the log, just after it."""

    position: int
    attempt: int
    place: str

    def request(self, run: str, *, num_samples: int, seed: int, policy_version: int) -> RolloutRequest:
        """Return the request of the next attempt: one rollout, with an id and a seed of its own."""
        attempt = self.attempt + 1
        sample = sample_at(self.position, num_samples, seed)
        return RolloutRequest(
            request_id=f"{run}-{self.position:08d}-{attempt}",
            samples=((sample, rollout_seed(self.position, seed + attempt - 1)),),
            policy_version=policy_version,
        )


def stale_rollouts(run: str, events: Iterable[LogEvent], after: str) -> list[StaleRollout]:
    """Return what went stale in ``events`` after the place ``after`` ("": from the start), in order.

    A place is an event id and, behind a colon, how many of its ids lie before it. Left out are rollouts that
    no dispatcher of this run asked for, and those of the last attempt.
    """
    record_id = re.compile(rf"{re.escape(run)}-([0-9]{{8,}})(?:-([0-9]+))?\.([0-9]+)")
    found = []
    for event in events:
        if event.kind != "dropped" or event.text("reason") != "stale":
            continue
        for index, name in enumerate(event.ids(), start=1):
            known = record_id.fullmatch(name)
            attempt = int(known[2] or 1) if known else MAX_ATTEMPTS
            place = f"{event.event_id}:{index}"
            if known and attempt < MAX_ATTEMPTS and _order(place) > _order(after):
                position = int(known[1]) + int(known[3])
                found.append(StaleRollout(position=position, attempt=attempt, place=place))
    return found


def _order(place: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall("[0-9]+", place))


class StaleRollouts:
    """Those that wait to be asked for again, in the order in which they went stale."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: deque[StaleRollout] = deque()
        self._read_to = "-"
        self._num_seen = 0
        self.asked_up_to = ""

    def first(self, number: int, num_dropped: int) -> list[StaleRollout]:
        """Return up to ``number`` of those that wait longest; they stay until ``forget``. Raises BrokerError.

        The log is read on only when ``num_dropped``, the count of what went stale, has moved.
        """
        if num_dropped != self._num_seen:
            if self._read_to == "-":
                self.asked_up_to = read_stale_after(self._broker)
            events = list(read_events(self._broker, self._read_to))
            self._read_to = events[-1].event_id if events else self._read_to
            self._waiting.extend(stale_rollouts(self._broker.keys.run, events, self.asked_up_to))
            self._num_seen = num_dropped
        return [self._waiting[index] for index in range(min(number, len(self._waiting)))]

    def forget(self, number: int | None) -> None:
        """Let go of the first ``number``, which were asked for; None: another dispatcher was faster."""
        if number is None:
            self._waiting.clear()
            self._read_to, self._num_seen = "-", 0
            return
        for _ in range(number):
            self.asked_up_to = self._waiting.popleft().place
