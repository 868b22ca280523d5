"""Finds the log of a run, in its archive and its running broker, and audits it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, broker_errors
from broker_schemas.errors import BrokerError, BrokerUnavailable, ConfigError, DataError
from configs import load_config
from rollstream.history.agreement import (
    BrokerSums,
    checkpoint_faults,
    claim_faults,
    payload_faults,
    training_log_faults,
)
from rollstream.history.archive_loss import NOTHING
from rollstream.history.archive_reading import PayloadIndex
from rollstream.history.audit import Audit, WholeLog, take_audit
from rollstream.run_folder import RunFolder, latest_steps, read_json_lines, read_json_map
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access


def audit_run(path: Path) -> Audit:
    """Return the audit of the run in ``path``: the log balanced, and compared with all that knows of it.

    Raises ConfigError where there is no log at all, BrokerError where only a broker that cannot be asked
    has it, DataError for files that are another program's.
    """
    folder = RunFolder.existing(path)
    broker, not_asked = reach_broker(folder)
    if broker is None and not folder.archive_dir.exists():
        error = BrokerUnavailable if folder.broker.exists() else ConfigError
        raise error(
            f"run folder {path}: no archive, and no broker to ask ({not_asked}), so no log to audit; "
            "start the stack again, or keep archive.enabled on"
        )
    rows = latest_steps(read_json_lines(folder.train_log))  # first: what it has, the log has by then
    sums = None if broker is None else read_sums(broker)
    if sums is not None and sums.counters.get("log_trimmed") and not folder.archive_dir.exists():
        raise ConfigError(
            f"run folder {path}: no archive keeps the log, and the broker has let go of its "
            f"{sums.counters['log_trimmed']} oldest events (it holds an eighth of broker.max_bytes); keep "
            "archive.enabled on for a log that can be audited"
        )
    log = WholeLog(folder.archive_dir, broker, upto=None if sums is None else sums.last_event_id)
    audit = take_audit(log, counters=None if sums is None else dict(sums.counters))
    faults = [*log.faults, *audit.faults]
    if sums is not None:
        faults += claim_faults(audit.ledger, sums.open_claims)
    faults += training_log_faults(audit.ledger, rows)
    faults += checkpoint_faults(audit.ledger, folder.latest_checkpoint())
    if folder.archive_dir.exists():
        payloads = PayloadIndex(folder.archive_dir)
        faults += [*payloads.faults, *payload_faults(audit.ledger, payloads)]
    return replace(audit, faults=faults, broker_not_asked=not_asked)


def read_sums(broker: Broker) -> BrokerSums:
    """Return counters, open claims and the place in the log that they stand for; raises BrokerError."""
    keys = broker.keys
    with broker_errors("reading the run's sums"):
        pipe = broker.client.pipeline(transaction=True)
        pipe.hgetall(keys.named("counters"))
        pipe.zrange(keys.named("claims"), 0, -1)
        pipe.xrevrange(keys.named("events"), count=1)
        counters, claims, last = pipe.execute()
    return BrokerSums(
        counters={name.decode(): int(value) for name, value in counters.items()},
        open_claims=frozenset(int(step) for step in claims),
        last_event_id=last[0][0].decode() if last else NOTHING,
    )


def keep_audit(path: Path, audit: Audit) -> None:
    """Write the sums into the run folder, where the report finds them."""
    write_atomically(RunFolder(path).audit, json.dumps(audit.to_json(), indent=1) + "\n")


def running_broker(folder: RunFolder) -> Broker | None:
    """Return the broker of a running stack; None when it is down: the archive has the log then."""
    return reach_broker(folder)[0]


def reach_broker(folder: RunFolder) -> tuple[Broker | None, str]:
    """Return the broker that the run folder names, with "", or None and why nobody can be asked there.

    Raises DataError for a file that names no broker.
    """
    if not folder.broker.exists():
        return None, "no stack is running"
    url = (read_json_map(folder.broker) or {}).get("url")
    if not isinstance(url, str):
        raise DataError(
            f"{folder.broker}: names no url, expected the one of the run's broker; remove the file"
        )
    try:
        address = replace(_address(folder, url), retries=0)
        return Broker.connect(folder.name, address, socket_timeout_s=5), ""
    except (BrokerError, ConfigError) as exc:  # away, or it refuses us; also a credential we were not given
        return None, " ".join(str(exc).split())


def _address(folder: RunFolder, url: str) -> BrokerAddress:
    """Return the address with the credentials and certificates that the run's configuration names."""
    try:
        config = load_config(folder.resolved_config)
    except ConfigError:  # of another version: its broker may take anybody
        return BrokerAddress(url=url)
    if config.broker.url is None:
        return BrokerAddress(url=url)
    return access.broker_address(config)
