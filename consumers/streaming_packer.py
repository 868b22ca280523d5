"""The packer of `stage2_async`: reads matched segments, lets filled packs leave, drops what became stale."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from broker_schemas.broker.packer_door import PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.broker.policy import read_policy
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.errors import BrokerError
from broker_schemas.records.freshness import oldest_allowed
from consumers.fill_warning import FillWarning
from consumers.metrics import PackerMetrics
from consumers.pack_buffer import PackBuffer, PackBufferSettings, PackChoice, Urgency
from consumers.packing import OversizedSegment

log = logging.getLogger(__name__)
READ_COUNT = 256


@dataclass(frozen=True, kw_only=True)
class StreamingPackerSettings:
    """``packs_per_rank`` = GA, below it a rank is hungry; ``patience_s`` without news, any pack will do."""

    buffer: PackBufferSettings
    world_size: int
    packs_per_rank: int
    queue_limit: int
    version_window: int
    patience_s: float = 1.0
    block_ms: int = 100


class StreamingPacker:
    """One packer process. What is pending and not in its buffer it finds again by itself."""

    def __init__(self, door: PackerDoor, metrics: PackerMetrics, settings: StreamingPackerSettings) -> None:
        self._door = door
        self._metrics = metrics
        self._settings = settings
        self._buffer = PackBuffer(settings.buffer)
        self._entries: dict[str, PendingDescriptor] = {}
        self._news_at_s = 0.0
        self._fill_warning = FillWarning(settings.buffer.min_fill_ratio)

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``; a broker that is away is waited for."""
        keep_stepping(
            lambda: self.step(time.monotonic()), stop, role="packer", on_trouble=self._door.look_again
        )

    def step(self, now_s: float) -> int:
        """Read, drop, pack once; return the number of packs made. Raises BrokerError."""
        policy = read_policy(self._door.broker)
        oldest = oldest_allowed(policy.policy_version if policy else 0, self._settings.version_window)
        if self._admit(self._read(now_s)):
            self._news_at_s = now_s
        self._drop_stale(oldest)
        num_packs = 0
        depths = self._door.ready_depths(self._settings.world_size)
        while (choice := self._buffer.next_pack(self._urgency(depths, now_s))) is not None:
            rank = depths.index(min(depths))
            num_packs += self._commit(choice, rank, oldest)
            depths[rank] += 1
        self._metrics.on_buffer(len(self._buffer))
        return num_packs

    def _read(self, now_s: float) -> list[PendingDescriptor]:
        places = min(READ_COUNT, self._buffer.num_free_places)
        if not places:
            return []
        if self._door.is_due(now_s):
            held = {item.entry_id for item in self._entries.values()}
            found = self._door.found_again(now_s, count=places, held=held)
            if found:
                return found
        return self._door.read(count=places, block_ms=self._settings.block_ms)

    def _admit(self, pending: list[PendingDescriptor]) -> int:
        num_admitted = 0
        for item in pending:
            descriptor = item.descriptor
            try:
                num_admitted += self._buffer.insert(descriptor)
            except OversizedSegment as exc:
                log.error("packer: %s", exc)
                self._door.drop([(item.entry_id, descriptor.record_id)], reason="oversized")
                continue
            self._entries[descriptor.record_id] = item
        return num_admitted

    def _drop_stale(self, oldest: int) -> None:
        stale = self._buffer.discard(lambda segment: segment.policy_version < oldest)
        if stale:
            entries = [(self._entries.pop(item.record_id).entry_id, item.record_id) for item in stale]
            self._door.drop(entries, reason="stale")

    def _urgency(self, depths: list[int], now_s: float) -> Urgency:
        if min(depths) >= self._settings.packs_per_rank:
            return "patient"
        return "forced" if now_s - self._news_at_s > self._settings.patience_s else "hungry"

    def _commit(self, choice: PackChoice, rank: int, oldest: int) -> int:
        pack = choice.pack
        entry_ids = tuple(self._entries[name].entry_id for name in pack.record_ids)
        planned = PlannedPack(rank=rank, pack=pack, entry_ids=entry_ids)
        try:
            commit = self._door.commit(
                [planned], oldest_policy_version=oldest, queue_limit=self._settings.queue_limit
            )
        except BrokerError:
            # it may or may not have been committed: what is gone by then is found out by the next commit
            self._buffer.put_back(choice.segments)
            raise
        gone = set(commit.gone)
        for name in gone or pack.record_ids:
            self._entries.pop(name, None)
        if gone:
            log.warning("packer: %d segments were taken by another packer", len(gone))
            self._buffer.put_back(item for item in choice.segments if item.record_id not in gone)
            return 0
        self._metrics.on_dropped(stale=commit.num_stale, overflow=commit.num_overflow)
        if commit.num_packs:
            is_underfilled = self._fill_warning.is_underfilled(pack, choice.reason)
            self._metrics.on_pack(pack, reason=choice.reason, is_underfilled=is_underfilled)
        return commit.num_packs
