"""The log as values: one event a transition, read from the stream or from the archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogEvent:
    """One entry of the log. ``event_id`` is ``<server ms>-<n>``; ``fields`` are text but for ``summary``."""

    event_id: str
    kind: str
    fields: Mapping[str, bytes]

    @property
    def at_ms(self) -> int:
        """When it happened, ms of the server's clock."""
        return int(self.event_id.partition("-")[0])

    def text(self, name: str) -> str:
        return self.fields.get(name, b"").decode("utf-8", "replace")

    def number(self, name: str) -> int:
        return int(self.fields[name])

    def ids(self, name: str = "ids") -> list[str]:
        return self.text(name).split()

    def rows(self, name: str) -> list[list[str]]:
        """Return a field of lines as rows of columns; empty for an empty field."""
        return [line.split("\t") for line in self.text(name).split("\n") if line]


def event_from_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> LogEvent:
    """Return a stream entry as an event."""
    named = {name.decode(): value for name, value in fields.items()}
    kind = named.pop("type", b"").decode()
    return LogEvent(event_id=entry_id.decode(), kind=kind, fields=named)
