"""Sends a batch of rollout requests to one server: retried on new connections, then in halves [V-4]."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from broker_schemas.errors import RolloutServerError, ServerRefused, ServerUnavailable

Item = TypeVar("Item")
Reply = TypeVar("Reply")
# a batch that needs longer than so many single requests is given up
PATIENCE: Final = 4


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """``request_timeout_s`` bounds one request; a whole batch ends within a few times as long."""

    request_timeout_s: float
    clock: Callable[[], float] = field(default=time.monotonic)

    @property
    def batch_timeout_s(self) -> float:
        return PATIENCE * self.request_timeout_s


def send_batch(
    items: Sequence[Item],
    send: Callable[[Item], Reply],
    *,
    reconnect: Callable[[], None],
    settings: RetrySettings,
) -> list[Reply]:
    """Return the replies in the order of ``items``, all sent at once; none for no items.

    What fails is sent once more after ``reconnect``, then in halves down to single items; what has
    succeeded is not sent again, so that an item with its seed is answered once.
    Raises the error of an item that fails alone, a ServerRefused at once, and ServerUnavailable with the
    last error when the batch takes longer than ``settings.batch_timeout_s``.
    """
    batch = _Batch(items, send, reconnect, settings)
    failed = batch.attempt(range(len(items)))
    if failed:
        failed = batch.attempt_again(failed)
    if failed:
        batch.halve(failed)
    return [batch.replies[place] for place in range(len(items))]


class _Batch(Generic[Item, Reply]):
    def __init__(
        self,
        items: Sequence[Item],
        send: Callable[[Item], Reply],
        reconnect: Callable[[], None],
        settings: RetrySettings,
    ) -> None:
        self._items = items
        self._send = send
        self._reconnect = reconnect
        self._settings = settings
        self._give_up_at = settings.clock() + settings.batch_timeout_s
        self._last_error: RolloutServerError | None = None
        self.replies: dict[int, Reply] = {}

    def attempt(self, places: Sequence[int]) -> list[int]:
        """Send the items at ``places`` at once; return the places that failed, in order."""
        with ThreadPoolExecutor(max_workers=max(1, len(places))) as pool:
            outcomes = list(pool.map(self._try, places))
        failed = []
        for place, outcome in zip(places, outcomes, strict=True):
            if outcome is None:
                continue
            if isinstance(outcome, ServerRefused):
                raise outcome
            self._last_error = outcome
            failed.append(place)
        return failed

    def attempt_again(self, places: Sequence[int]) -> list[int]:
        """Send on new connections, while there is time."""
        if self._settings.clock() >= self._give_up_at:
            raise ServerUnavailable(
                f"{len(places)} of {len(self._items)} rollouts not done within "
                f"{self._settings.batch_timeout_s:g} s; last error: {self._last_error}"
            ) from self._last_error
        self._reconnect()
        return self.attempt(places)

    def halve(self, places: Sequence[int]) -> None:
        """Send ``places`` in halves until all are answered; raises the error of one that fails alone."""
        if len(places) == 1:
            assert self._last_error is not None
            raise self._last_error
        middle = (len(places) + 1) // 2
        for half in (places[:middle], places[middle:]):
            failed = self.attempt_again(half)
            if failed:
                self.halve(failed)

    def _try(self, place: int) -> RolloutServerError | None:
        try:
            self.replies[place] = self._send(self._items[place])
        except RolloutServerError as exc:
            return exc
        return None
