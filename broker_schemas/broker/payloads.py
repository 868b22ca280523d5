"""Reads payloads: the one way a matched segment leaves the broker."""

from __future__ import annotations

from collections.abc import Sequence

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.records.records import MatchedSegment


def fetch_segments(broker: Broker, record_ids: Sequence[str]) -> list[MatchedSegment]:
    """Return the payloads of ``record_ids`` in their order; raises BrokerError, RecordError.

    A missing payload is our own bug or a lost broker: it raises KeyError with the ids.
    """
    if not record_ids:
        return []
    with broker_errors("fetching payloads"):
        bodies = broker.client.mget([broker.keys.payload(name) for name in record_ids])
    missing = [name for name, body in zip(record_ids, bodies, strict=True) if body is None]
    if missing:
        raise KeyError(f"payloads of {len(missing)} segments are not in the broker, first {missing[0]}")
    return [MatchedSegment.decode_body(bytes(body)) for body in bodies if isinstance(body, bytes)]
