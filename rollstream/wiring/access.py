"""What every role's wiring needs: the broker, the model's inputs, the data, the metrics endpoint, signals."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, check_server, check_takes_jobs, open_redis
from broker_schemas.broker.run_identity import read_deciding
from broker_schemas.errors import ConfigError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.model_folder import resolve_model_dir
from broker_schemas.method.processor_file import ImageBounds
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.identity import refuse_another_past
from configs import RunConfig
from configs.deciding_values import split_values
from learner.companions import Companions
from rollstream.run_folder import RunFolder
from rollstream.wiring.endpoint import Endpoint
from rollstream.wiring.log_lines import LOG_JSON_VARIABLE, JsonLines

if TYPE_CHECKING:
    import redis

log = logging.getLogger("rollstream.wiring")
# a process listens on base_port + its role's offset + its index
PORT_OFFSETS: Final = {
    "learn": 0,
    "dispatch": 20,
    "pack": 21,
    "archive": 22,
    "export": 23,
    "gather": 24,
    "match": 30,
    "produce": 60,
}


def run_folder(config: RunConfig) -> RunFolder:
    """Return the folder of the run."""
    return RunFolder(Path(config.run.output_dir) / config.run.name)


def broker_address(config: RunConfig) -> BrokerAddress:
    """Return where the broker is, with credentials from the environment variables that the file names.

    Raises ConfigError for a missing variable, or without ``broker.url`` (which the stack fills in).
    """
    broker = config.broker
    if broker.url is None:
        raise ConfigError(
            "broker.url: not set, expected the URL of a running server for a role on its own; "
            "give --set broker.url=redis://host:port/0, or start the whole stack with 'rollstream up'"
        )
    return BrokerAddress(
        url=broker.url,
        username=_from_environment(broker.username_env, "broker.username_env"),
        password=_from_environment(broker.password_env, "broker.password_env"),
        ca_file=broker.tls.ca_file,
        cert_file=broker.tls.cert_file,
        key_file=broker.tls.key_file,
        check_hostname=broker.tls.check_hostname,
    )


def _from_environment(name: str | None, key: str) -> str | None:
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{key}: environment variable {name} is not set, expected the broker's credential")
    return value


def needs_broker(config: RunConfig) -> bool:
    """Return whether the learner needs a queue: a run of A steps alone, without a broker, does not."""
    return config.b_ratio > 0 or config.broker.url is not None


def open_broker(config: RunConfig) -> Broker:
    """Connect to the run's broker; raises BrokerError, ConfigError.

    A role that is configured for another past than that of the run which the broker holds is refused.
    """
    broker = Broker.connect(config.run.name, broker_address(config))
    try:
        refuse_another_past(read_deciding(broker), split_values(config)[0])
    except ConfigError:
        broker.close()
        raise
    return broker


def jobs_address(config: RunConfig) -> BrokerAddress:
    """Return where RQ's jobs live: the broker, or ``broker.jobs_url``, with the broker's credentials.

    Raises ConfigError as ``broker_address``.
    """
    address = broker_address(config)
    return address if config.broker.jobs_url is None else replace(address, url=config.broker.jobs_url)


def open_jobs(config: RunConfig, broker: Broker) -> redis.Redis:
    """Return the connection of RQ's jobs, the broker's own where they live there; raises BrokerError."""
    address = jobs_address(config)
    client = broker.client if config.broker.jobs_url is None else open_redis(address)
    check_server(client, address)
    check_takes_jobs(client, address)
    return client


def model_dir(config: RunConfig) -> Path:
    """Return the folder of the start model; an inline config stands in the run folder once it is made."""
    if config.model.name_or_path is not None:
        return resolve_model_dir(config.model.name_or_path)
    return resolve_model_dir(run_folder(config).model_dir)


def prompt_builder(config: RunConfig, folder: Path) -> PromptBuilder:
    """Return the prompts of a model folder with the run's texts."""
    return PromptBuilder(
        folder, system_prompt=config.model.system_prompt, instruction=config.model.instruction
    )


def data_root(config: RunConfig, jsonl: str) -> Path:
    """Return the folder that image paths must not leave."""
    return Path(config.data.root) if config.data.root is not None else Path(jsonl).parent


def companions(config: RunConfig) -> Companions:
    """Return what goes beside the weights of the run: its start model's files with its image bounds."""
    return Companions(folder=model_dir(config), bounds=image_bounds(config))


def image_bounds(config: RunConfig) -> ImageBounds:
    """Return the image bounds that the run sets itself."""
    image = config.model.image
    return ImageBounds(min_pixels=image.min_pixels, max_pixels=image.max_pixels)


def image_processor(config: RunConfig, folder: Path, jsonl: str) -> ImageProcessor:
    """Return the image processor of a model folder over the root of one data set."""
    return ImageProcessor(
        folder,
        data_root(config, jsonl),
        min_pixels=config.model.image.min_pixels,
        max_pixels=config.model.image.max_pixels,
    )


def evaluation_images(config: RunConfig, folder: Path) -> ImageProcessor | None:
    """Return the image processor over the root of the validation set, None where there is no such set."""
    return None if config.data.val_jsonl is None else image_processor(config, folder, config.data.val_jsonl)


def read_whole(config: RunConfig, jsonl: str, *, passed_over: dict[str, str] | None = None) -> list[Sample]:
    """Return every sample of a data set in the run's object order; ``passed_over`` as ``read_dataset``."""
    return read_dataset(
        jsonl,
        root=config.data.root,
        ordering=config.data.object_ordering,
        seed=config.run.seed,
        passed_over=passed_over,
    )


def start_endpoint(config: RunConfig, role: str, index: int) -> Endpoint:
    """Return the metrics and the health of a process, served at its port unless metrics are off.

    Raises ConfigError.
    """
    base_port = config.metrics.base_port
    return Endpoint.start(config, role, index, base_port and base_port + PORT_OFFSETS[role] + index)


def say_ready(config: RunConfig, role: str, index: int, **facts: object) -> None:
    """Log that a role begins its work: its run, where broker and endpoint are, and what it says of itself."""
    base_port = config.metrics.base_port
    port = base_port + PORT_OFFSETS[role] + index
    told = {
        "broker": BrokerAddress(url=config.broker.url).shown if config.broker.url else "none",
        "endpoint": f"http://{config.metrics.host}:{port}" if base_port else "none",
        **facts,
    }
    log.info("ready: %s", ", ".join(f"{name} {value}" for name, value in told.items()))


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def log_to_stderr(run: str, role: str, index: int) -> None:
    """Send log lines to standard error, each with run and role: text, or JSON where that is asked for."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s run={run} role={role}-{index} %(message)s",
        force=True,
    )
    if os.environ.get(LOG_JSON_VARIABLE):
        logging.getLogger().handlers[0].setFormatter(JsonLines(run=run, role=f"{role}-{index}"))
    for noisy in ("httpx", "urllib3", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
