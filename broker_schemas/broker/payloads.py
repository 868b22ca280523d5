"""Reads payloads and the packs of an open step: what a learner takes without moving anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import BodyMissing
from broker_schemas.records import codec
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment


def fetch_segments(broker: Broker, record_ids: Sequence[str]) -> list[MatchedSegment]:
    """Return the payloads of ``record_ids`` in their order; raises BrokerError, RecordError.

    A payload that is not there raises BodyMissing with its id: the broker lost it, or somebody took it away.
    """
    if not record_ids:
        return []
    with broker_errors("fetching payloads"):
        bodies = broker.client.mget([broker.keys.payload(name) for name in record_ids])
    missing = [name for name, body in zip(record_ids, bodies, strict=True) if body is None]
    if missing:
        raise BodyMissing(
            f"segment {missing[0]}: no payload in the broker, nor of {len(missing) - 1} others of "
            f"{len(bodies)}; see that nothing else writes to this server and that it evicts nothing"
        )
    return [MatchedSegment.decode_body(bytes(body)) for body in bodies if isinstance(body, bytes)]


def read_coming_packs(
    broker: Broker, rank: int, *, oldest_policy_version: int, at_most: int
) -> list[ReadyPack]:
    """Return the ready packs of ``rank`` that a claim would take now, in its order; raises BrokerError."""
    keys = broker.keys
    with broker_errors("looking for packs of the coming step"):
        members: Any = broker.client.zrangebyscore(
            keys.ready_versions(rank), oldest_policy_version, "+inf", start=0, num=at_most
        )
        pipe = broker.client.pipeline(transaction=False)
        for member in members:
            entry_id = entry_of(member)
            pipe.xrange(keys.ready(rank), entry_id, entry_id)
        found = pipe.execute()
    return [_pack_of(fields) for entries in found for _, fields in entries]


def entry_of(member: bytes) -> str:
    """Return the stream entry that a member of ``ready:<rank>:versions`` names: see ``prelude.lua``."""
    milliseconds, _, number = member.decode().partition("-")
    return f"{milliseconds}-{int(number)}"


def read_filled_packs(
    broker: Broker, optimizer_step: int, ranks: Sequence[int]
) -> list[tuple[ReadyPack, ...]]:
    """Return, for each of ``ranks``, the ready packs of an open step in the order of its claim.

    Raises BrokerError. They stay where they are: only the claim takes them.
    """
    keys = broker.keys
    with broker_errors("looking for packs of the open step"):
        pipe = broker.client.pipeline(transaction=False)
        for rank in ranks:
            pipe.xrange(keys.ready(rank))
        queues = pipe.execute()
    wanted = str(optimizer_step).encode()
    return [
        tuple(_pack_of(fields) for _, fields in entries if fields.get(b"step") == wanted)
        for entries in queues
    ]


def _pack_of(fields: Mapping[bytes, bytes]) -> ReadyPack:
    return ReadyPack.from_body(codec.decode_map(fields[b"pack"]))
