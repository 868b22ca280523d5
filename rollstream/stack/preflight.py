"""Finds what would fail a stack later, before anything is started or written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from broker_schemas.broker.connection import (
    check_keeps_everything,
    check_server,
    check_takes_jobs,
    open_redis,
)
from broker_schemas.errors import BrokerUnavailable, DataError
from configs import RunConfig
from rollstream.stack.embedded_redis import find_redis_server
from rollstream.stack.ports_in_use import check_ports_free
from rollstream.stack.scrape_targets import metrics_ports
from rollstream.watch.trackers import check_usable
from rollstream.wiring import access
from rollstream.wiring.adapters import adapted_layers
from rollstream.wiring.trainable import Untrainable, find_untrainable
from rollstream.wiring.vllm import rollout_chunk


def check_inputs(config: RunConfig) -> Untrainable:
    """Find what would fail later, before anything is written; raises ConfigError, DataError, BrokerError.

    Returns the samples that the run leaves out.
    """
    check_usable(config.tracking.to)
    data = config.data
    for key, path in (("data.train_jsonl", data.train_jsonl), ("data.val_jsonl", data.val_jsonl)):
        if path is not None and not Path(path).is_file():
            raise DataError(
                f"{key}: no file {path}; correct the path (it is relative to the working directory, "
                f"{Path.cwd()}), or make the data with 'rollstream data import' or 'rollstream data scenes'"
            )
    if config.model.name_or_path is not None:
        adapted_layers(config, access.model_dir(config))
    untrainable = find_untrainable(config)
    rollout_chunk(config, wait_s=0.0)
    if config.metrics.base_port:
        check_ports_free(config.metrics.host, {port: str(name) for name, port in metrics_ports(config)})
    if config.broker.url is None:
        find_redis_server()
        return untrainable
    _check_servers(config)
    return untrainable


def _check_servers(config: RunConfig) -> None:
    """Ask the run's server, and that of its jobs, what they are; raises ConfigError, BrokerError."""
    embedded = "correct broker.url, or leave it out for an embedded one"
    beside = "correct broker.jobs_url, or leave it out to keep jobs on the broker"
    checks = [(access.broker_address(config), check_keeps_everything, embedded)]
    if config.b_ratio > 0:
        remedy = beside if config.broker.jobs_url else embedded
        checks.append((access.jobs_address(config), check_takes_jobs, remedy))
    for address, check, remedy in checks:
        client = open_redis(dataclasses.replace(address, retries=1), socket_timeout_s=5.0)
        try:
            check_server(client, address)
            check(client, address)
        except BrokerUnavailable as exc:
            raise BrokerUnavailable(f"{exc}; start that server, {remedy}") from exc
        finally:
            client.close()
