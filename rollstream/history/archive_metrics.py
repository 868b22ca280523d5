"""The archive's metrics, on a registry passed in."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class ArchiveMetrics:
    """What the archive counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._events = Counter(
            "rollstream_archived_events_total", "Events that are safe on disk.", registry=registry
        )
        self._size = Gauge("rollstream_archive_size_bytes", "Bytes of the archive.", registry=registry)

    def on_archived(self, *, num_events: int, size_bytes: int) -> None:
        self._events.inc(num_events)
        self._size.set(size_bytes)
