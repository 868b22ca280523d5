"""What a broker lost that the archive has: found when the two meet again, noted beside the archive.

A broker that crashes with `durability: everysec` may come back without about the last second of its log. The
archive is ahead of it then: those transitions were undone, and the run does them again, perhaps otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import DataError
from broker_schemas.records.events import LogEvent
from broker_schemas.records.ledger import UNDONE

LOSSES_FILE: Final = "losses.jsonl"
NOTHING: Final = "0-0"


@dataclass(frozen=True, kw_only=True)
class BrokerLoss:
    """Archived events with ``kept_upto`` < id <= ``lost_upto`` were undone; ids are ``<server ms>-<n>``."""

    kept_upto: str
    lost_upto: str

    def covers(self, event_id: str) -> bool:
        """Say whether the event was undone."""
        return event_order(self.kept_upto) < event_order(event_id) <= event_order(self.lost_upto)


def find_loss(broker: Broker, cursor: str, noted: str) -> BrokerLoss | None:
    """Return what the broker lost of a log that is archived up to ``cursor``, None for nothing.

    ``noted`` is the cursor that the broker knows of. It trims no event beyond that one, so an archived event
    beyond it that is missing was lost. Raises BrokerError.
    """
    if event_order(cursor) <= event_order(noted):
        return None
    stream = broker.keys.named("events")
    with broker_errors("comparing the archive with the log"):
        found: Any = broker.client.xrevrange(stream, cursor, "-", count=1)
    kept = found[0][0].decode() if found else NOTHING
    return None if kept == cursor else BrokerLoss(kept_upto=kept, lost_upto=cursor)


def noted_cursor(broker: Broker) -> str:
    """Return how far the broker believes the archive is; raises BrokerError."""
    with broker_errors("reading the archive's cursor"):
        noted = broker.client.hget(broker.keys.named("archive"), "cursor")
    return NOTHING if noted is None else noted.decode()  # type: ignore[union-attr]


def read_losses(folder: Path) -> list[BrokerLoss]:
    """Return the losses noted beside an archive, oldest first, without a torn last line; raises DataError."""
    path = folder / LOSSES_FILE
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        losses = [BrokerLoss(**json.loads(line)) for line in lines]
        for loss in losses:
            loss.covers(NOTHING)
    except (ValueError, RecursionError, TypeError, AttributeError) as exc:
        raise DataError(f"{path}: not a list of losses ({exc}); restore it from a copy") from exc
    return losses


def note_loss(folder: Path, loss: BrokerLoss) -> None:
    """Append a loss to those of the archive, on disk before this returns; raises OSError."""
    with (folder / LOSSES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(loss)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def as_it_stands(event: LogEvent, losses: Sequence[BrokerLoss]) -> LogEvent:
    """Return the event, of kind ``undone:<kind>`` where a loss covers it."""
    if event.kind.startswith(UNDONE) or not any(loss.covers(event.event_id) for loss in losses):
        return event
    return LogEvent(event_id=event.event_id, kind=UNDONE + event.kind, fields=event.fields)


def event_order(event_id: str) -> tuple[int, int]:
    """Return what events are ordered by; raises ValueError for what is no event id."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)
