"""The archive: events and the payloads they make permanent, written before the broker may free them.

Two append-only files of frames (length, msgpack map) in the run folder; a torn last frame is cut off.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.event_log import follow_events
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.errors import DataError
from broker_schemas.records import codec
from broker_schemas.records.events import LogEvent
from broker_schemas.records.records import MatchedSegment
from rollstream.history.archive_loss import NOTHING, as_it_stands, find_loss, note_loss, read_losses
from rollstream.history.archive_metrics import ArchiveMetrics

log = logging.getLogger(__name__)
FRAME: Final = struct.Struct("<I")
EVENTS_FILE: Final = "events.frames"
PAYLOADS_FILE: Final = "payloads.frames"
EVENTS_KEPT_IN_BROKER: Final = 20_000


def read_frames(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset of its end, map) of each whole frame; a missing file has none, a torn end is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while len(head := file.read(FRAME.size)) == FRAME.size:
            (length,) = FRAME.unpack(head)
            body = file.read(length)
            if len(body) < length:
                return
            yield file.tell(), codec.decode_map(body, max_bytes=length)


def read_archived_events(folder: Path) -> Iterator[LogEvent]:
    """Yield the archived events of a run, oldest first; what a broker lost later is ``undone:<kind>``."""
    losses = read_losses(folder)
    for _, frame in read_frames(folder / EVENTS_FILE):
        event = LogEvent(event_id=frame["id"], kind=frame["type"], fields=frame["fields"])
        yield as_it_stands(event, losses)


def last_archived(folder: Path) -> str:
    """Return the id of the last archived event, ``0-0`` for none."""
    cursor = NOTHING
    for _, frame in read_frames(folder / EVENTS_FILE):
        cursor = frame["id"]
    return cursor


class PayloadIndex:
    """Finds archived payloads by record id; the file is read once for its offsets."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PAYLOADS_FILE
        self._place: dict[str, tuple[int, int]] = {}
        start = 0
        for end, frame in read_frames(self._path):
            self._place[frame["record_id"]] = (start, end)
            start = end

    def fetch(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        """Return segments in the order asked; raises DataError for one that is not archived."""
        found = []
        with self._path.open("rb") as file:
            for name in record_ids:
                if name not in self._place:
                    raise DataError(f"archive {self._path}: no payload of {name}; was the run archived?")
                start, end = self._place[name]
                file.seek(start + FRAME.size)
                frame = codec.decode_map(file.read(end - start - FRAME.size))
                found.append(MatchedSegment.decode_body(frame["body"]))
        return found


class ArchiveWriter:
    """Follows the log of one run; safe to stop and start at any point."""

    def __init__(self, broker: Broker, folder: Path, metrics: ArchiveMetrics | None = None) -> None:
        self._broker = broker
        self._metrics = metrics or ArchiveMetrics(CollectorRegistry())
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.cursor = last_archived(folder)
        self._noted = self.cursor
        self._events = _open_for_append(folder / EVENTS_FILE)
        self._payloads = _open_for_append(folder / PAYLOADS_FILE)

    def loop(self, stop: threading.Event) -> None:
        """Archive until ``stop``, then once more to the end of the log; waits for a lost broker."""
        keep_stepping(lambda: self.step(block_ms=500), stop, role="archive")
        while self.step(block_ms=1):
            pass
        self._advance()

    def step(self, *, block_ms: int) -> int:
        """Archive one batch; return its number of events. Raises BrokerError, OSError (disk full)."""
        events = follow_events(self._broker, self.cursor, block_ms=block_ms)
        if not events:
            return 0
        self._write_payloads(events)
        for event in events:
            _append(self._events, {"id": event.event_id, "type": event.kind, "fields": dict(event.fields)})
        for file in (self._payloads, self._events):
            file.flush()
            os.fsync(file.fileno())
        self.cursor = events[-1].event_id
        self._advance()
        self._metrics.on_archived(num_events=len(events), size_bytes=self.size_bytes)
        return len(events)

    def _advance(self) -> None:
        """Tell the broker how far the archive is; where it remembers otherwise, find out what it lost."""
        while True:
            reply = self._broker.run(
                "advance_archive", ["archive"], [self.cursor, EVENTS_KEPT_IN_BROKER, self._noted]
            )
            if reply[0]:
                self._noted = self.cursor
                return
            remembered = reply[1].decode()
            loss = find_loss(self._broker, self._noted, remembered)
            if loss is not None:
                note_loss(self._folder, loss)
                log.error(
                    "archive: the broker crashed and lost acknowledged events after %s, up to %s; they are "
                    "undone and done again (broker.durability 'always' loses nothing)",
                    *(loss.kept_upto, loss.lost_upto),
                )
            self._noted = remembered

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return self._events.tell() + self._payloads.tell()

    def _write_payloads(self, events: Sequence[LogEvent]) -> None:
        claimed = [
            name
            for event in events
            if event.kind == "claimed"
            for _, _, _, ids in event.rows("packs")
            for name in ids.split()
        ]
        if not claimed:
            return
        with broker_errors("reading payloads for the archive"):
            keys = [self._broker.keys.payload(name) for name in claimed]
            bodies: Sequence[Any] = self._broker.client.mget(keys)
        for name, body in zip(claimed, bodies, strict=True):
            if body is not None:  # None: archived before a crash of ours, and freed since
                _append(self._payloads, {"record_id": name, "body": bytes(body)})

    def close(self) -> None:
        self._events.close()
        self._payloads.close()


def _open_for_append(path: Path) -> BinaryIO:
    whole = 0
    for end, _ in read_frames(path):
        whole = end
    file = path.open("ab")
    file.truncate(whole)
    return file


def _append(file: BinaryIO, frame: Mapping[str, Any]) -> None:
    body = codec.encode_map(frame)
    file.write(FRAME.pack(len(body)) + body)
