"""Binds a run's name on a broker to one run; another run under the same name is told whose it is."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, cast

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import ConfigError
from broker_schemas.records.identity import RunIdentity, refuse_another_past


def adopt_run(broker: Broker, identity: RunIdentity, folder: Path, *, optimizer_step: int) -> None:
    """Make the name ours, or find that it is; settings that changed are recorded in the log.

    Raises ConfigError where another run, or another past of this one, has the name; BrokerError.
    """
    last = identity.changed[-1].changes if identity.changed else {}
    reply = broker.run(
        "adopt_identity",
        ["identity"],
        [
            identity.run_id,
            _json(identity.deciding),
            _json(identity.current_settings),
            f"{socket.gethostname()}:{folder.resolve()} (user {os.getuid()})",
            optimizer_step,
            _json(last) if last else "",
        ],
    )
    if reply[0]:
        return
    run_id, deciding, holder = reply[1].decode(), json.loads(reply[2]), reply[3].decode()
    if run_id == identity.run_id:
        refuse_another_past(deciding, identity.deciding)
    raise ConfigError(
        f"run {broker.keys.run}: the broker holds another run of this name, {run_id}, of {holder}; "
        f"this folder, {folder}, is run {identity.run_id}. Give this one a name of its own "
        "(--set run.name=...), or delete the other's keys with 'rollstream gc' once nobody uses it"
    )


def read_deciding(broker: Broker) -> dict[str, str]:
    """Return the values that decide the run's past, as its broker knows them; empty before it was adopted."""
    with broker_errors("reading the run's identity"):
        raw: Any = broker.client.hget(broker.keys.named("identity"), "deciding")
    return {} if raw is None else {str(key): str(value) for key, value in json.loads(raw).items()}


def read_run(broker: Broker) -> tuple[str, str] | None:
    """Return (run id, who made it ours) of the run that has this name, None before one was adopted."""
    with broker_errors("reading the run's identity"):
        run_id, holder = (
            cast("bytes | None", broker.client.hget(broker.keys.named("identity"), name))
            for name in ("run_id", "holder")
        )
    return None if run_id is None else (run_id.decode(), (holder or b"?").decode("utf-8", "replace"))


def _json(values: Any) -> str:
    return json.dumps(dict(values), sort_keys=True)
