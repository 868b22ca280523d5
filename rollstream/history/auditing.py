"""Finds the log of a run, in its archive and its running broker, and audits it."""

from __future__ import annotations

import json
from pathlib import Path

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.status import read_status
from broker_schemas.errors import BrokerError, ConfigError
from rollstream.history.audit import Audit, all_events, take_audit
from rollstream.run_folder import RunFolder
from rollstream.staged_folder import write_atomically


def audit_run(path: Path) -> Audit:
    """Return the audit of the run in ``path``; raises ConfigError where there is no log at all."""
    folder = RunFolder.existing(path)
    broker = running_broker(folder)
    if broker is None and not folder.archive_dir.exists():
        raise ConfigError(
            f"run folder {path}: no archive and no running broker, so there is no log to audit; "
            "start the stack again, or keep archive.enabled on"
        )
    counters = dict(read_status(broker, 1).counters) if broker is not None else None
    return take_audit(all_events(folder.archive_dir, broker), counters=counters)


def keep_audit(path: Path, audit: Audit) -> None:
    """Write the sums into the run folder, where the report finds them."""
    write_atomically(RunFolder(path).audit, json.dumps(audit.to_json(), indent=1) + "\n")


def running_broker(folder: RunFolder) -> Broker | None:
    """Return the broker of a running stack; None when it is down: the archive has the log then."""
    if not folder.broker.exists():
        return None
    url = json.loads(folder.broker.read_text(encoding="utf-8"))["url"]
    try:
        return Broker.connect(folder.name, BrokerAddress(url=url, retries=0), socket_timeout_s=5)
    except BrokerError:
        return None
