"""The archive: events and the payloads they make permanent, written before the broker may free them.

Two append-only files of checksummed frames in the run folder.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.event_log import follow_events
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.records.events import LogEvent
from rollstream.history.archive_loss import NOTHING, find_loss, note_loss
from rollstream.history.archive_metrics import ArchiveMetrics
from rollstream.history.archive_reading import EVENTS_FILE, PAYLOADS_FILE, last_archived
from rollstream.history.frame_file import FrameFile

log = logging.getLogger(__name__)
EVENTS_KEPT_IN_BROKER: Final = 20_000
DISK_PAUSE_S: Final = 2.0


class ArchiveWriter:
    """Follows the log of one run; safe to stop and start at any point.

    ``confirm`` is called before files are written; it raises PlaceTaken once another writes them.
    """

    def __init__(
        self,
        broker: Broker,
        folder: Path,
        metrics: ArchiveMetrics | None = None,
        confirm: Callable[[], object] = lambda: None,
    ) -> None:
        self._broker = broker
        self._confirm = confirm
        self._metrics = metrics or ArchiveMetrics(CollectorRegistry())
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._disk = TroubleLog(log, "archive: free some space")
        self.cursor = last_archived(folder)
        self._noted = self.cursor
        self._is_announced = self.cursor != NOTHING
        self._events = FrameFile(folder / EVENTS_FILE)
        self._payloads = FrameFile(folder / PAYLOADS_FILE)

    def loop(self, stop: threading.Event) -> None:
        """Archive until ``stop``, then once more to the end of the log; waits for broker and disk.

        Raises RunStopped when the folder was moved or removed.
        """
        keep_stepping(lambda: self._patient_step(stop), stop, role="archive")
        while self.step(block_ms=1):
            pass
        self._advance()

    def _patient_step(self, stop: threading.Event) -> None:
        try:
            self.step(block_ms=500)
        except OSError as exc:
            # nothing was appended, and the broker frees nothing that is not archived
            self._disk.on_trouble(exc)
            stop.wait(DISK_PAUSE_S)
        else:
            self._disk.on_well()

    def step(self, *, block_ms: int) -> int:
        """Archive one batch; return its number of events. Raises BrokerError, RunStopped, OSError (full)."""
        self._events.check_in_place()
        if not self._is_announced:
            self._advance()  # from now on nothing is let go of that is not here
            self._is_announced = True
        events = follow_events(self._broker, self.cursor, block_ms=block_ms)
        # behind the archive's end comes what followed it, not what a restarted server did instead
        while events and not self._advance():
            events = follow_events(self._broker, self.cursor, block_ms=1)
        if not events:
            return 0
        payloads = self._payload_frames(events)
        self._confirm()
        self._payloads.append(payloads)
        self._events.append(self._event_frames(events))
        self.cursor = events[-1].event_id
        self._advance()
        self._metrics.on_archived(num_events=len(events), size_bytes=self.size_bytes)
        return len(events)

    def _advance(self) -> bool:
        """Tell the broker how far the archive is; where it remembers otherwise, find out what it lost.

        Return whether nothing was lost since the last time.
        """
        is_whole, was_looked_for = True, 0
        while True:
            reply = self._broker.run(
                "advance_archive",
                ["archive"],
                [self.cursor, EVENTS_KEPT_IN_BROKER, self._noted, was_looked_for],
            )
            if reply[0]:
                self._noted = self.cursor
                return is_whole
            remembered = reply[1].decode()
            loss = find_loss(self._broker, self.cursor, remembered)
            if loss is not None:
                is_whole = False
                note_loss(self._folder, loss)
                log.error(
                    "archive: the broker crashed and lost acknowledged events after %s, up to %s; they are "
                    "undone and done again (broker.durability 'always' loses nothing)",
                    *(loss.kept_upto, loss.lost_upto),
                )
            self._noted, was_looked_for = remembered, 1

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return self._events.size_bytes + self._payloads.size_bytes

    def _event_frames(self, events: Sequence[LogEvent]) -> list[dict[str, Any]]:
        """Return frames that each name the event before them, so that a missing one shows."""
        before = [self.cursor, *(event.event_id for event in events)]
        return [
            {"id": event.event_id, "after": after, "type": event.kind, "fields": dict(event.fields)}
            for after, event in zip(before, events, strict=False)
        ]

    def _payload_frames(self, events: Sequence[LogEvent]) -> list[dict[str, Any]]:
        claimed = [
            name
            for event in events
            if event.kind == "claimed"
            for pack in event.claimed_packs()
            for name in pack.record_ids
        ]
        if not claimed:
            return []
        with broker_errors("reading payloads for the archive"):
            keys = [self._broker.keys.payload(name) for name in claimed]
            bodies: Sequence[Any] = self._broker.client.mget(keys)
        # None: archived before a crash of ours, and freed since
        return [
            {"record_id": name, "body": bytes(body)}
            for name, body in zip(claimed, bodies, strict=True)
            if body is not None
        ]

    def close(self) -> None:
        self._events.close()
        self._payloads.close()
