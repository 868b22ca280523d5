"""The identity of a run: made from its configuration and files, kept in its folder, told to the broker."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.run_identity import adopt_run
from broker_schemas.errors import DataError
from broker_schemas.method.model_fingerprint import model_fingerprint
from broker_schemas.records.identity import RunIdentity, going_on
from configs import RunConfig
from configs.deciding_values import split_values
from configs.show import resolved_yaml
from rollstream.run_folder import RunFolder, read_json_map
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access


def settle_identity(config: RunConfig) -> RunIdentity:
    """Return the identity of the run in its folder, made at its first start; what changed is kept there too.

    Raises ConfigError, with nothing written, where configuration, data or model would give the run another
    past; DataError for a file that is no identity.
    """
    folder = access.run_folder(config)
    deciding, settings = split_values(config)
    deciding |= {
        "data.train_jsonl (its contents)": json.dumps(data_fingerprint(Path(config.data.train_jsonl))),
        "model.name_or_path (its files)": json.dumps(model_fingerprint(access.model_dir(config))),
    }
    known = read_identity(folder)
    if known is None:
        identity = RunIdentity(run_id=uuid.uuid4().hex, deciding=deciding, settings=settings)
    else:
        step = folder.latest_checkpoint() or 0
        identity = going_on(known, deciding, settings, optimizer_step=step)
    folder.path.mkdir(parents=True, exist_ok=True)
    if identity != known:
        write_atomically(folder.identity, json.dumps(identity.to_json(), indent=1) + "\n")
    if identity != known or not folder.resolved_config.exists():
        keep_resolved(folder, resolved_yaml(config))
    return identity


def adopt_on_broker(config: RunConfig, broker: Broker, identity: RunIdentity) -> None:
    """Tell the broker whose run it holds; raises ConfigError where it holds another one, BrokerError."""
    folder = access.run_folder(config)
    adopt_run(broker, identity, folder.path, optimizer_step=folder.latest_checkpoint() or 0)


def read_identity(folder: RunFolder) -> RunIdentity | None:
    """Return the identity kept in a run folder, None before there is one; raises DataError."""
    body = read_json_map(folder.identity)
    if body is None:
        return None
    try:
        return RunIdentity.from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DataError(
            f"{folder.identity}: not the identity of a run ({exc!r}); restore it from a copy"
        ) from exc


def keep_resolved(folder: RunFolder, text: str) -> None:
    """Write the resolved configuration; one that differs stays beside it as ``resolved-<n>.yaml``."""
    path = folder.resolved_config
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == text:
            return
        number = 1
        while (kept := path.with_name(f"resolved-{number}.yaml")).exists():
            number += 1
        path.rename(kept)
    write_atomically(path, text)


def data_fingerprint(path: Path) -> str:
    """Return a digest of a data set's lines; raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as exc:
        raise DataError(f"data.train_jsonl: {path} cannot be read ({exc})") from exc
