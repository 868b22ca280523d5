"""Brings a body of an older schema version to the newest one, a single version at a time.

To change a record: raise its SCHEMA_VERSION, give the new field a default here, keep the golden bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker_schemas.errors import MalformedRecord, SchemaTooNew

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

# (kind, version it starts from) -> function that returns the body of the next version
UPGRADES: dict[tuple[str, int], Upgrade] = {
    # only its place changed: from the entry of the stream to a key beside it
    ("segment", 1): lambda body: body,
    ("matched", 1): lambda body: {**body, "repeat_positions": b""},
}


def upgrade(kind: str, body: dict[str, Any], schema_version: int, newest: int) -> dict[str, Any]:
    """Return ``body`` of ``schema_version`` as one of version ``newest``.

    Raises SchemaTooNew above ``newest``, MalformedRecord below 1 or where no path leads upwards.
    """
    if schema_version > newest:
        raise SchemaTooNew(
            f"{kind}: got schema_version {schema_version}, expected at most {newest}; upgrade rollstream here"
        )
    while schema_version < newest:
        step = UPGRADES.get((kind, schema_version))
        if step is None:
            raise MalformedRecord(f"{kind}: got schema_version {schema_version}, which never existed")
        body, schema_version = step(body), schema_version + 1
    if schema_version < 1:
        raise MalformedRecord(f"{kind}: got schema_version {schema_version}, expected 1 to {newest}")
    return body
