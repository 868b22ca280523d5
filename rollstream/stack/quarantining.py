"""`rollstream quarantine`: takes a rollout out of its claim by hand, while no learner trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, broker_errors
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.lease import holding
from broker_schemas.errors import ConfigError
from broker_schemas.records.packs import Untrainable
from configs import RunConfig, load_config
from rollstream.history.archive import ArchiveWriter
from rollstream.history.auditing import running_broker
from rollstream.run_folder import RunFolder
from rollstream.run_lock import StackLock
from rollstream.stack.embedded_redis import EmbeddedRedis
from rollstream.wiring import access
from rollstream.wiring.learn import claim_settings


def quarantine_record(path: Path, record_id: str, *, detail: str) -> int:
    """Take ``record_id`` out of the open claim that holds it; return the optimizer step of that claim.

    Said again it changes nothing. Raises ConfigError while a learner holds its place, for what it trains
    would be another step than the log's; for a rollout in no open claim; BrokerError.
    """
    folder = RunFolder.existing(path)
    config = load_config(folder.resolved_config)
    with _broker_of(folder, config) as broker, holding(broker, "learner", on_loss=lambda: None) as (held, _):
        optimizer_step = _claim_with(held, record_id)
        item = Untrainable(record_id=record_id, reason="quarantined_by_hand", detail=detail)
        door = LearnerDoor(held, claim_settings(config))
        door.quarantine(optimizer_step=optimizer_step, segments=[item])
        if folder.archive_dir.exists():
            _bring_archive_up_to_date(broker, folder)
    return optimizer_step


@contextmanager
def _broker_of(folder: RunFolder, config: RunConfig) -> Iterator[Broker]:
    """Yield the run's broker; one of its own that is down is started for as long as it takes."""
    if config.broker.url is not None:
        broker: Broker | None = Broker.connect(config.run.name, access.broker_address(config))
    else:
        broker = running_broker(folder)
    if broker is not None:
        try:
            yield broker
        finally:
            broker.close()
        return
    if not folder.redis_dir.exists():
        raise ConfigError(f"run folder {folder.path}: its broker left no files, so it holds no claims")
    lock = StackLock.acquire(folder.path)
    try:
        server = EmbeddedRedis.start(folder.redis_dir, durability=config.broker.durability)
        try:
            broker = Broker.connect(config.run.name, BrokerAddress(url=server.url))
            yield broker
            broker.close()
        finally:
            server.stop()
    finally:
        lock.release()


def _claim_with(broker: Broker, record_id: str) -> int:
    keys, wanted = broker.keys, record_id.encode()
    with broker_errors("looking through the open claims"):
        members: Any = broker.client.zrange(keys.named("claims"), 0, -1)
        for step in map(int, members):
            fields: Any = broker.client.hgetall(keys.named(f"claim:{step}"))
            ids = [name for key, value in fields.items() if key.startswith(b"ids:") for name in value.split()]
            if wanted in ids or b"out:" + wanted in fields:
                return step
    raise ConfigError(
        f"rollout {record_id}: no open claim holds it; it was never claimed, or a checkpoint covers its "
        "step: `rollstream audit RUN --json` and `rollstream inspect` say what became of it"
    )


def _bring_archive_up_to_date(broker: Broker, folder: RunFolder) -> None:
    """Write what just happened to the archive, unless a running archive does."""
    try:
        with holding(broker, "archive", on_loss=lambda: None) as (held, lease):
            writer = ArchiveWriter(held, folder.archive_dir, confirm=lease.keep)
            try:
                while writer.step(block_ms=1):
                    pass
            finally:
                writer.close()
    except ConfigError:  # the archive of a running stack holds its place, and follows the log
        return
