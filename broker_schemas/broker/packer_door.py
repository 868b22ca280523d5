"""What the packer asks of the broker: descriptors, and the commit of packs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.group_reader import IDLE_MS, GroupReader, Row
from broker_schemas.broker.keys import PACKER_GROUP
from broker_schemas.errors import RecordError
from broker_schemas.records import codec
from broker_schemas.records.packs import MatchedDescriptor, ReadyPack


@dataclass(frozen=True, kw_only=True)
class PendingDescriptor:
    """A descriptor the packer holds, with the stream entry that is acknowledged when it is packed."""

    entry_id: bytes
    descriptor: MatchedDescriptor


@dataclass(frozen=True, kw_only=True)
class PlannedPack:
    """A pack to commit for ``rank``: the pack and the stream entries of its segments, in order."""

    rank: int
    pack: ReadyPack
    entry_ids: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class PackCommit:
    """What a commit did; ``gone`` names segments that were no longer pending (then nothing was changed)."""

    num_packs: int = 0
    num_stale: int = 0
    num_overflow: int = 0
    gone: tuple[str, ...] = ()


class PackerDoor:
    """The packer's side of the broker. All methods raise BrokerError."""

    def __init__(self, broker: Broker, consumer: str = "packer", *, idle_ms: int = IDLE_MS) -> None:
        self.broker = broker
        self._reader = GroupReader(broker, "matched", PACKER_GROUP, consumer, idle_ms)
        self.look_again = self._reader.look_again
        self.is_due = self._reader.is_due

    def read(self, *, count: int, block_ms: int) -> list[PendingDescriptor]:
        """Return up to ``count`` new descriptors, waiting up to ``block_ms`` for the first; may be empty."""
        return self._rows(self._reader.read(count=count, block_ms=block_ms))

    def found_again(self, now_s: float, *, count: int, held: Container[bytes]) -> list[PendingDescriptor]:
        """Return descriptors that are pending, in nobody's hands, and not ``held`` (entry ids) by the caller.

        See ``GroupReader.found_again``.
        """
        return self._rows(self._reader.found_again(now_s, count=count, held=held))

    def _rows(self, rows: Sequence[Row]) -> list[PendingDescriptor]:
        found: list[PendingDescriptor] = []
        for entry_id, fields in rows:
            if not fields:
                continue
            try:
                descriptor = MatchedDescriptor.from_entry(fields)
            except RecordError:
                record_id = fields.get(b"record_id", b"?").decode("utf-8", "replace")
                self.drop([(entry_id, record_id)], reason="malformed_descriptor")
                continue
            found.append(PendingDescriptor(entry_id=entry_id, descriptor=descriptor))
        return found

    def commit(
        self,
        packs: Sequence[PlannedPack],
        *,
        oldest_policy_version: int,
        queue_limit: int,
        sealed_step: int = -1,
        open_step: int = -1,
    ) -> PackCommit:
        """Commit all ``packs`` or none.

        ``sealed_step`` >= 0 says that they complete that optimizer step, ``open_step`` >= 0 that they belong
        to it and more are to come.
        """
        arguments: list[str | int | bytes] = [
            PACKER_GROUP,
            oldest_policy_version,
            queue_limit,
            sealed_step if open_step < 0 else f"{open_step}+",
            len(packs),
        ]
        for planned in packs:
            pack = planned.pack
            arguments += [
                planned.rank,
                codec.encode_map(pack.to_body()),
                pack.policy_version,
                pack.pack_id,
                len(pack.record_ids),
            ]
            for entry_id, record_id in zip(planned.entry_ids, pack.record_ids, strict=True):
                arguments += [entry_id, record_id]
        reply = self.broker.run("commit_pack", ["matched", "sealed", "open_step"], arguments)
        if reply[0] == 0:
            return PackCommit(gone=tuple(name.decode() for name in reply[1:]))
        return PackCommit(num_packs=reply[1], num_stale=reply[2], num_overflow=reply[3])

    def drop(self, entries: Sequence[tuple[bytes, str]], *, reason: str) -> int:
        """Drop descriptors (entry id, record id) with a reason; return how many were still pending."""
        arguments: list[str | int | bytes] = [PACKER_GROUP, reason, len(entries)]
        for entry_id, record_id in entries:
            arguments += [entry_id, record_id]
        return int(self.broker.run("drop_matched", ["matched"], arguments))

    def ready_depths(self, world_size: int) -> list[int]:
        """Return how many packs wait for each rank."""
        with broker_errors("reading queue depths"):
            pipe = self.broker.client.pipeline(transaction=False)
            for rank in range(world_size):
                pipe.xlen(self.broker.keys.ready(rank))
            return [int(depth) for depth in pipe.execute()]
