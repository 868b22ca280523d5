"""Wires the exporter."""

from __future__ import annotations

import dataclasses

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.errors import ConfigError
from configs import RunConfig
from rollstream.watch.exporter import ExporterSettings, RunCollector
from rollstream.wiring import access
from rollstream.wiring.identity import warn_of_another_past

SCRAPE_TIMEOUT_S = 2.0


def exporter_settings(config: RunConfig) -> ExporterSettings:
    """Return what the exporter says of the configuration; the on-policy variants train without lag."""
    is_async = config.variant == "stage2_async"
    return ExporterSettings(
        world_size=config.learner_world_size,
        queue_limit=config.stage2_async.queue_limit,
        version_window=config.stage2_async.version_window if is_async else 0,
        budget_bytes=config.broker.max_bytes,
        max_steps=config.training.max_steps,
        b_ratio=float(config.b_ratio),
    )


def run_exporter(config: RunConfig, index: int) -> None:
    """Serve until a signal; raises ConfigError without a port. A broker that is away is told as a metric."""
    if config.metrics.base_port == 0:
        raise ConfigError("metrics.base_port: got 0, expected a port for the exporter to listen on")
    stop = access.stop_on_signals()
    address = dataclasses.replace(access.broker_address(config), retries=0)
    client = open_redis(address, socket_timeout_s=SCRAPE_TIMEOUT_S)
    broker = Broker(client, RunKeys(config.run.name), address)
    registry = access.start_endpoint(config, "export", index).registry
    registry.register(RunCollector(broker, exporter_settings(config)))
    access.say_ready(config, "export", index)
    warn_of_another_past(config, broker)
    stop.wait()
    broker.close()
