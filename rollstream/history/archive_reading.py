"""Reads the archive of a run: its events in order, its payloads by id, and what is wrong with either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.records.events import LogEvent
from broker_schemas.records.records import MatchedSegment
from rollstream.history.archive_loss import NOTHING, as_it_stands, event_order, read_losses
from rollstream.history.frames import Damage, Frame, read_frame, scan_frames

EVENTS_FILE: Final = "events.frames"
PAYLOADS_FILE: Final = "payloads.frames"


class ArchivedEvents:
    """The archived events of a run, oldest first, each once; what a broker lost later is ``undone:<kind>``.

    An event that a frozen writer wrote a second time is left out. ``faults`` fill while it is iterated:
    damaged places of the file, and events that are missing between two others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.faults: list[str] = []
        self.last_id = NOTHING

    def __iter__(self) -> Iterator[LogEvent]:
        losses = read_losses(self._folder)
        path = self._folder / EVENTS_FILE
        for item in scan_frames(path):
            if isinstance(item, Damage):
                self.faults.append(str(item))
            if not isinstance(item, Frame):
                continue
            event = _event(item, path)
            if event_order(event.event_id) <= event_order(self.last_id):
                continue
            after = item.body.get("after", self.last_id)
            if event_order(after) > event_order(self.last_id):
                self.faults.append(
                    f"{path}: events after {self.last_id} up to {after} are missing before byte {item.start}"
                )
            self.last_id = event.event_id
            yield as_it_stands(event, losses)


def read_archived_events(folder: Path) -> Iterator[LogEvent]:
    """Yield the archived events of a run, oldest first; raises DataError at the end of a damaged archive."""
    archived = ArchivedEvents(folder)
    yield from archived
    if archived.faults:
        raise DataError(f"archive: {archived.faults[0]}")


def last_archived(folder: Path) -> str:
    """Return the id of the last archived event, ``0-0`` for none."""
    archived = ArchivedEvents(folder)
    for _ in archived:
        pass
    return archived.last_id


class PayloadIndex:
    """Finds archived payloads by record id; the file is read once for its offsets."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PAYLOADS_FILE
        self._place: dict[str, tuple[int, int]] = {}
        self.faults: list[str] = []
        for item in scan_frames(self._path):
            if isinstance(item, Frame):
                name = item.body.get("record_id")
                if isinstance(name, str):
                    self._place[name] = (item.start, item.end)
                else:
                    self.faults.append(f"{self._path}: the frame at byte {item.start} names no record")
            elif isinstance(item, Damage):
                self.faults.append(str(item))

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._place

    def fetch(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        """Return segments in the order asked; raises DataError for one that is not archived."""
        for name in record_ids:
            if name not in self._place:
                why = self.faults[0] if self.faults else "was the run archived?"
                raise DataError(f"archive {self._path}: no payload of {name}; {why}")
        if not record_ids:
            return []
        with self._path.open("rb") as file:
            found = []
            for name in record_ids:
                start, end = self._place[name]
                file.seek(start)
                found.append(MatchedSegment.decode_body(read_frame(file.read(end - start))["body"]))
        return found


def _event(frame: Frame, path: Path) -> LogEvent:
    body = frame.body
    try:
        event_order(body["id"])
        return LogEvent(event_id=body["id"], kind=body["type"], fields=body["fields"])
    except (KeyError, ValueError, AttributeError) as exc:
        raise DataError(
            f"{path}: the frame at byte {frame.start} is no event ({exc!r}); is this another program's file?"
        ) from exc
