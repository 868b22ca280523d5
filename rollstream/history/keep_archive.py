"""Wires the archive."""

from __future__ import annotations

from broker_schemas.broker.lease import holding
from configs import RunConfig
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_metrics import ArchiveMetrics
from rollstream.wiring import access
from rollstream.wiring.identity import check_folder


def run_archive(config: RunConfig, index: int) -> None:
    """Run until a signal, then archive to the end of the log."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    check_folder(config, broker)
    metrics = ArchiveMetrics(access.start_endpoint(config, "archive", index).registry)
    try:
        with holding(broker, "archive", on_loss=stop.set) as (held, lease):
            folder = access.run_folder(config).archive_dir
            writer = ArchiveWriter(held, folder, metrics, confirm=lease.keep)
            access.say_ready(config, "archive", index, folder=folder, after=writer.cursor)
            try:
                writer.loop(stop)
            finally:
                writer.close()
    finally:
        broker.close()
