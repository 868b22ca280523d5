"""Finds what there is to watch of a run: folder, configuration, its broker while it runs, its log after.

A folder or a configuration file names the run; the one need not be where the other is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.errors import BrokerError, BrokerRefused, ConfigError, DataError
from configs import RunConfig, load_config
from rollstream.history.archive_reading import ArchivedEvents
from rollstream.history.audit import WholeLog
from rollstream.history.log_samples import LoggedRun, logged_run
from rollstream.run_folder import RunFolder, read_json_map
from rollstream.wiring import access

if TYPE_CHECKING:
    import redis

LOOK_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """``config`` is None for a folder without a readable one, ``address`` None where no broker can be there.

    ``is_own_server``: the broker that `rollstream up` embeds, whose memory is all of the run.
    """

    folder: RunFolder
    config: RunConfig | None
    address: BrokerAddress | None
    is_own_server: bool = False

    @property
    def world_size(self) -> int:
        return self.config.learner_world_size if self.config is not None else 1

    @property
    def run_name(self) -> str:
        return self.config.run.name if self.config is not None else self.folder.name

    def broker(self) -> Broker:
        """Return a connection that gives up quickly; nothing is sent yet. Raises BrokerRefused."""
        assert self.address is not None
        return Broker(_quick(self.address), RunKeys(self.run_name), self.address)

    def jobs(self, broker: Broker) -> redis.Redis:
        """Return where RQ's workers are listed; raises BrokerRefused, ConfigError."""
        if self.config is None or self.config.broker.jobs_url is None:
            return broker.client
        return _quick(replace(broker.address, url=self.config.broker.jobs_url))

    def logged(self) -> LoggedRun:
        """Return what the archive tells, and the broker beyond it where it answers.

        Raises ConfigError where neither a folder nor a log of the run is there, BrokerRefused.
        """
        if self.address is None:
            return self.archived()
        broker = self.broker()
        try:
            events = list(WholeLog(self.folder.archive_dir, broker))
        except BrokerRefused:
            raise
        except BrokerError as exc:
            return replace(self.archived(), trouble=str(exc))
        finally:
            broker.close()
        if not events and not self.folder.path.exists():
            raise ConfigError(
                f"run {self.run_name}: its broker holds no log, and no folder {self.folder.path} is there; "
                "name its broker with --broker redis://host:port/0"
            )
        return logged_run(events, self.world_size)

    def archived(self) -> LoggedRun:
        """Return what the archive tells; nothing without one."""
        return logged_run(ArchivedEvents(self.folder.archive_dir), self.world_size)


def _quick(address: BrokerAddress) -> redis.Redis:
    return open_redis(replace(address, retries=0), socket_timeout_s=LOOK_TIMEOUT_S)


def find_run(path: Path, broker_url: str | None = None) -> WatchedRun:
    """Return the run of a folder or of a configuration file; ``broker_url`` goes before what they say.

    Raises ConfigError where neither is there, for a file that is no configuration, and for
    credentials that the environment lacks.
    """
    if path.is_file():
        config: RunConfig | None = load_config(path)
        assert config is not None
        folder = access.run_folder(config)
    else:
        folder = RunFolder.existing(path)
        config = _resolved(folder)
    url = broker_url or (config.broker.url if config is not None else None)
    if url is not None:
        return WatchedRun(folder=folder, config=config, address=_address(config, url, broker_url))
    embedded = _embedded_url(folder)
    address = None if embedded is None else BrokerAddress(url=embedded)
    return WatchedRun(folder=folder, config=config, address=address, is_own_server=address is not None)


def _resolved(folder: RunFolder) -> RunConfig | None:
    """Return the configuration kept in a run folder; None while it is torn, or one of another version."""
    if not folder.resolved_config.is_file():
        return None
    try:
        return load_config(folder.resolved_config)
    except (ConfigError, DataError):
        return None


def _address(config: RunConfig | None, url: str, given: str | None) -> BrokerAddress:
    if config is None or (given is not None and "@" in given):  # its credentials stand in the URL
        return BrokerAddress(url=url)
    named = config.model_copy(update={"broker": config.broker.model_copy(update={"url": url})})
    return access.broker_address(named)


def _embedded_url(folder: RunFolder) -> str | None:
    """Return where a running stack's own server listens; None once the stack is over, or was killed."""
    try:
        found = read_json_map(folder.broker)
    except DataError:
        return None
    url, pid = (found or {}).get("url"), (found or {}).get("pid")
    return url if isinstance(url, str) and isinstance(pid, int) and _is_alive(pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
