"""The identity of a run: made from its configuration and files, kept in its folder, told to the broker."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from pathlib import Path
from typing import Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.run_identity import adopt_run, read_deciding, read_run
from broker_schemas.errors import BrokerError, ConfigError, DataError
from broker_schemas.method.model_fingerprint import model_fingerprint
from broker_schemas.records.identity import RunIdentity, going_on, refuse_another_past
from configs import RunConfig
from configs.deciding_values import split_values
from configs.show import resolved_yaml
from rollstream.run_folder import RunFolder, read_json_map
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access

log = logging.getLogger("rollstream.wiring")
DATA_KEY: Final = "data.train_jsonl (its contents)"
MODEL_KEY: Final = "model.name_or_path (its files)"


def settle_identity(config: RunConfig) -> RunIdentity:
    """Return the identity of the run in its folder, made at its first start; what changed is kept there too.

    Raises ConfigError, with nothing written, where configuration, data or model would give the run another
    past; DataError for a file that is no identity.
    """
    folder = access.run_folder(config)
    deciding, settings = split_values(config)
    deciding |= _data_value(config) | _model_value(config)
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


def check_data(config: RunConfig, broker: Broker) -> None:
    """Refuse a role whose training set is another than that of the run which the broker holds.

    Requests name samples by their number. Before the run was adopted, nothing is compared.
    Raises ConfigError, DataError, BrokerError.
    """
    known = read_deciding(broker)
    if DATA_KEY in known:
        refuse_another_past(known, _data_value(config))


def warn_of_model(config: RunConfig, broker: Broker) -> None:
    """Warn where the start model differs from that of the run which the broker holds; raises BrokerError.

    It is no refusal: another machine may keep other files beside the same weights.
    """
    known = read_deciding(broker)
    if MODEL_KEY in known and (got := _model_value(config)[MODEL_KEY]) != known[MODEL_KEY]:
        log.warning(
            "model.name_or_path: %s is not the folder that run %s began with (got %s, its learner has %s); "
            "a tokenizer or weights that differ make rollouts which are rejected or wrong",
            *(access.model_dir(config), config.run.name, got, known[MODEL_KEY]),
        )


def check_folder(config: RunConfig, broker: Broker) -> None:
    """Refuse a role that would write what the broker holds into the folder of another run of that name.

    A folder without an identity, on another machine than the learner's, is said.
    Raises ConfigError, DataError, BrokerError.
    """
    folder, held = access.run_folder(config), read_run(broker)
    if held is None:
        return
    run_id, holder = held
    ours = read_identity(folder)
    if ours is None:
        log.warning(
            "%s: no identity of a run here; the broker holds run %s of %s", folder.path, run_id, holder
        )
    elif ours.run_id != run_id:
        raise ConfigError(
            f"run {config.run.name}: the broker holds run {run_id} of {holder}; this folder, {folder.path}, "
            f"is run {ours.run_id}. Give run.output_dir of that one, or this one a name of its own"
        )


def warn_of_another_past(config: RunConfig, broker: Broker) -> None:
    """Warn, naming the keys, where a role that only looks is configured for another past than the run's."""
    try:
        refuse_another_past(read_deciding(broker), split_values(config)[0])
    except ConfigError as exc:
        log.warning("what is shown is of another configuration: %s", exc)
    except BrokerError as exc:
        log.debug("the run's identity could not be read: %s", exc)


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


def _data_value(config: RunConfig) -> dict[str, str]:
    return {DATA_KEY: json.dumps(data_fingerprint(Path(config.data.train_jsonl)))}


def _model_value(config: RunConfig) -> dict[str, str]:
    return {MODEL_KEY: json.dumps(model_fingerprint(access.model_dir(config)))}


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
