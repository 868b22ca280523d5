"""Wires the archive."""

from __future__ import annotations

from configs import RunConfig
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_metrics import ArchiveMetrics
from rollstream.wiring import access


def run_archive(config: RunConfig, index: int) -> None:
    """Run until a signal, then archive to the end of the log."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    metrics = ArchiveMetrics(access.start_metrics(config, "archive", index))
    writer = ArchiveWriter(broker, access.run_folder(config).archive_dir, metrics)
    try:
        writer.loop(stop)
    finally:
        writer.close()
        broker.close()
