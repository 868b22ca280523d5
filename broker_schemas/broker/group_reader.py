"""Reads a consumer group: what is new, and what is pending and in nobody's hands any more.

The one place that finds such entries again: after a lost reply, a restart, or another consumer's death [Q-4].
It knows streams and consumers, not what the entries mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import GroupGone

log = logging.getLogger(__name__)
LOOK_EVERY_S: Final = 3.0
# with the time between two looks, a dead consumer's entries are found again within 15 s
IDLE_MS: Final = 10_000
REAP_EVERY_S: Final = 60.0
REAP_IDLE_MS: Final = 600_000
START: Final = b"0-0"
Row = tuple[bytes, dict[bytes, bytes]]


@dataclass
class GroupReader:
    """One consumer of ``group`` on ``stream``; ``consumer`` is its stable name. Methods raise BrokerError.

    ``idle_ms``: so long another consumer may hold an entry without a sign of life.
    """

    broker: Broker
    stream: str
    group: str
    consumer: str
    idle_ms: int = IDLE_MS
    _due_at_s: float = field(default=-math.inf, init=False)
    _reap_at_s: float = field(default=-math.inf, init=False)
    _own_after: bytes | None = field(default=START, init=False)
    _others_from: bytes | None = field(default=START, init=False)

    def read(self, *, count: int, block_ms: int | None) -> list[Row]:
        """Return up to ``count`` new entries, waiting up to ``block_ms`` for the first (None: not at all);
        may be empty.
        """
        client, stream = self.broker.client, self.broker.keys.named(self.stream)
        return rows_of(
            self._ask(
                f"reading {self.stream}",
                lambda: client.xreadgroup(
                    self.group, self.consumer, {stream: ">"}, count=count, block=block_ms
                ),
            )
        )

    def look_again(self) -> None:
        """Say that a reply may have been lost: look for pending entries at once."""
        self._due_at_s = -math.inf
        self._own_after, self._others_from = START, START

    def is_due(self, now_s: float) -> bool:
        """Say whether it is time to look for pending entries: at the start, every few seconds, when told."""
        return now_s >= self._due_at_s

    def found_again(self, now_s: float, *, count: int, held: Container[bytes] = ()) -> list[Row]:
        """Return up to ``count`` pending entries that are not ``held`` (entry ids); empty at a round's end.

        First those given to this consumer, then those that others have held for ``idle_ms``. What is returned
        is not looked at again before the next round.
        """
        while self._own_after is not None:
            found = self._own_page(count, held)
            if found:
                return found
        while self._others_from is not None:
            found = self._others_page(count, held)
            if found:
                log.warning("%s: took over %d entries of another %s", self.stream, len(found), self.group)
                return found
        self._own_after = self._others_from = START
        self._due_at_s = now_s + LOOK_EVERY_S
        self._reap(now_s)
        return []

    def _own_page(self, count: int, held: Container[bytes]) -> list[Row]:
        client, stream = self.broker.client, self.broker.keys.named(self.stream)
        position = {stream: self._own_after or START}
        rows = rows_of(
            self._ask(
                f"reading pending {self.stream}",
                lambda: client.xreadgroup(self.group, self.consumer, position, count=count),  # type: ignore[arg-type]
            )
        )
        self._own_after = rows[-1][0] if rows else None
        return self._not_held(rows, held)

    def _others_page(self, count: int, held: Container[bytes]) -> list[Row]:
        client, stream, start = (
            self.broker.client,
            self.broker.keys.named(self.stream),
            self._others_from or START,
        )
        reply = self._ask(
            f"taking over {self.stream}",
            lambda: client.xautoclaim(
                stream, self.group, self.consumer, self.idle_ms, start_id=start, count=count
            ),
        )
        self._others_from = reply[0] if reply and reply[0] != START else None
        return self._not_held(reply[1] if reply else [], held)

    def _not_held(self, rows: list[Row], held: Container[bytes]) -> list[Row]:
        """Let go of entries that were deleted under us; they would be pending for ever."""
        deleted = [entry_id for entry_id, fields in rows if not fields]
        if deleted:
            log.error("%s: %d pending entries were deleted by another hand", self.stream, len(deleted))
            with broker_errors(f"letting go of deleted {self.stream}"):
                self.broker.client.xack(self.broker.keys.named(self.stream), self.group, *deleted)
        return [row for row in rows if row[1] and row[0] not in held]

    def _reap(self, now_s: float) -> None:
        if now_s < self._reap_at_s:
            return
        self._reap_at_s = now_s + REAP_EVERY_S
        self.broker.run("reap_consumers", [self.stream], [self.group, self.consumer, REAP_IDLE_MS])

    def _ask(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            with broker_errors(doing):
                return call()
        except GroupGone as exc:
            self.broker.make_lost_groups(exc)
            return None


def rows_of(reply: Any) -> list[Row]:
    """Return the rows of an XREADGROUP reply over one stream (RESP2 list or RESP3 map)."""
    if not reply:
        return []
    batches = reply.values() if isinstance(reply, dict) else [batch for _, batch in reply]
    found: list[Row] = []
    for batch in batches:
        found += batch[0] if batch and isinstance(batch[0], list) else batch
    return found
