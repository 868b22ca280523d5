"""`rollstream gc RUN`: deletes every key of a run from its broker, those of its RQ queue included.

SCAN and UNLINK in batches: a server that other runs share is never blocked, and nothing else is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.keys import RunKeys
from broker_schemas.errors import ConfigError
from configs import load_config
from rollstream.history.auditing import running_broker
from rollstream.run_folder import RunFolder
from rollstream.run_lock import StackLock
from rollstream.wiring import access

BATCH: Final = 1000
RQ_WORKERS_KEY: Final = "rq:workers"
RQ_QUEUES_KEY: Final = "rq:queues"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was deleted: keys of a broker, and bytes of the embedded broker's files."""

    num_keys: int
    num_file_bytes: int


def collect_run(path: Path, *, force: bool = False) -> Collected:
    """Delete all that the broker holds of the run in ``path``; the run folder's log and archive stay.

    A broker of the run's own that has stopped loses its files instead.
    Raises ConfigError while a stack uses the run, unless ``force``; BrokerError.
    """
    folder = RunFolder.existing(path)
    if not force:
        _refuse_while_running(folder)
    config = load_config(folder.resolved_config)
    if config.broker.url is not None:
        broker = Broker.connect(config.run.name, access.broker_address(config))
    else:
        running = running_broker(folder)
        if running is None:
            return Collected(num_keys=0, num_file_bytes=_remove_files(folder.redis_dir))
        broker = running
    try:
        jobs = access.open_jobs(config, broker) if config.broker.jobs_url is not None else None
        return Collected(num_keys=collect(config.run.name, broker, jobs), num_file_bytes=0)
    finally:
        broker.close()


def _refuse_while_running(folder: RunFolder) -> None:
    try:
        StackLock.check_free(folder.path)
    except ConfigError as exc:
        raise ConfigError(f"gc: {exc}; or give --force to delete the queue under a running stack") from exc


def _remove_files(folder: Path) -> int:
    if not folder.exists():
        return 0
    num_bytes = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
    shutil.rmtree(folder)
    return num_bytes


def collect(run: str, broker: Broker, jobs: redis.Redis | None = None) -> int:
    """Delete every key of ``run`` on the broker's server, and on that of its jobs where it has one.

    Return how many there were. Raises BrokerError.
    """
    keys, client = RunKeys(run), broker.client
    jobs = jobs or client
    with broker_errors(f"collecting the keys of run {run}"):
        num_keys = _unlink(client, client.scan_iter(keys.prefix + "*", count=BATCH))
        num_keys += _unlink(jobs, _queue_keys(jobs, keys.rollout_queue))
        jobs.srem(RQ_QUEUES_KEY, f"rq:queue:{keys.rollout_queue}")
    return num_keys


def _queue_keys(client: Any, queue: str) -> Iterator[bytes]:
    """Yield the keys of an RQ queue: itself, its registries, its jobs with their results, its workers."""
    yield from client.scan_iter(f"rq:*:{queue}", count=BATCH)
    yield from client.scan_iter(f"rq:*:{queue}:*", count=BATCH)
    for key in client.scan_iter("rq:job:*", count=BATCH):
        if client.type(key) == b"hash" and client.hget(key, "origin") == queue.encode():
            yield key
            yield from client.scan_iter(b"rq:*:" + key.removeprefix(b"rq:job:") + b"*", count=BATCH)
    for key in client.scan_iter("rq:worker:*", count=BATCH):
        if client.type(key) == b"hash" and client.hget(key, "queues") == queue.encode():
            client.srem(RQ_WORKERS_KEY, key)
            yield key
            yield from client.scan_iter(key + b":*", count=BATCH)


def _unlink(client: Any, keys: Iterable[bytes]) -> int:
    num_keys, batch = 0, []
    for key in keys:
        batch.append(key)
        if len(batch) == BATCH:
            num_keys += client.unlink(*batch)
            batch = []
    return num_keys + (client.unlink(*batch) if batch else 0)
