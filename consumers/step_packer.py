"""The packer of the on-policy variants: waits for all rollouts of the open step, then seals its packs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker_schemas.broker.packer_door import PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.status import OpenStep, read_status
from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack
from consumers.fill_warning import FillWarning
from consumers.metrics import PackerMetrics
from consumers.packing import PackingError
from consumers.step_plans import StepPlan

log = logging.getLogger(__name__)
READ_COUNT = 512
# (lengths of carried segments, lengths of the step's own) -> plan
Planner = Callable[[Sequence[int], Sequence[int]], StepPlan]


@dataclass(frozen=True, kw_only=True)
class StepPackerSettings:
    """``capacity`` is tokens a pack."""

    world_size: int
    capacity: int
    min_fill_ratio: float
    block_ms: int = 100


class StepPacker:
    """One packer process. Raises RunStopped for a step that cannot be packed: nothing else would help."""

    def __init__(
        self, door: PackerDoor, plan: Planner, metrics: PackerMetrics, settings: StepPackerSettings
    ) -> None:
        self._door = door
        self._plan = plan
        self._metrics = metrics
        self._settings = settings
        self._held: dict[str, PendingDescriptor] = {}
        self._fill_warning = FillWarning(settings.min_fill_ratio)

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``; a broker that is away is waited for."""
        keep_stepping(self.step, stop, role="packer", on_trouble=self._door.look_again)

    def step(self) -> int:
        """Read once and seal the open step if it is complete; return the number of packs made."""
        self._read(time.monotonic())
        open_step = read_status(self._door.broker, self._settings.world_size).open_step
        if open_step is None or open_step.sealed:
            return 0
        own = [
            item for item in self._held.values() if item.descriptor.optimizer_step == open_step.optimizer_step
        ]
        if len(own) < open_step.num_rollouts:
            return 0
        carried = [
            item for item in self._held.values() if item.descriptor.optimizer_step != open_step.optimizer_step
        ]
        return self._seal(open_step, carried, sorted(own, key=_request_order))

    def _read(self, now_s: float) -> None:
        found: list[PendingDescriptor] = []
        if self._door.is_due(now_s):
            held = {item.entry_id for item in self._held.values()}
            found = self._door.found_again(now_s, count=READ_COUNT, held=held)
        found = found or self._door.read(count=READ_COUNT, block_ms=self._settings.block_ms)
        self._held.update({item.descriptor.record_id: item for item in found})

    def _seal(
        self, open_step: OpenStep, carried: Sequence[PendingDescriptor], own: Sequence[PendingDescriptor]
    ) -> int:
        started_s = time.monotonic()
        try:
            plan = self._plan(_lengths(carried), _lengths(own))
        except PackingError as exc:
            raise RunStopped(f"optimizer step {open_step.optimizer_step} cannot be packed: {exc}") from exc
        everything = [*carried, *own]
        planned = [
            self._planned_pack(rank, [everything[index] for index in indices])
            for rank, packs in enumerate(plan)
            for indices in packs
            if indices
        ]
        commit = self._door.commit(
            planned, oldest_policy_version=0, queue_limit=0, sealed_step=open_step.optimizer_step
        )
        for name in commit.gone or [name for item in planned for name in item.pack.record_ids]:
            self._held.pop(name, None)
        if not commit.num_packs:
            return 0
        for item in planned:
            self._metrics.on_pack(
                item.pack,
                reason="sealed",
                is_underfilled=self._fill_warning.is_underfilled(item.pack, "sealed"),
            )
        self._metrics.on_buffer(len(self._held))
        log.info(
            "packer: step %d sealed, %d packs, %d carried, %.0f ms",
            open_step.optimizer_step,
            commit.num_packs,
            len(self._held),
            1000 * (time.monotonic() - started_s),
        )
        return commit.num_packs

    def _planned_pack(self, rank: int, items: Sequence[PendingDescriptor]) -> PlannedPack:
        pack = ReadyPack.of([item.descriptor for item in items], capacity=self._settings.capacity)
        return PlannedPack(rank=rank, pack=pack, entry_ids=tuple(item.entry_id for item in items))


def _lengths(items: Sequence[PendingDescriptor]) -> list[int]:
    return [item.descriptor.encoded_length for item in items]


def _request_order(item: PendingDescriptor) -> tuple[str, int]:
    request_id, _, index = item.descriptor.record_id.rpartition(".")
    return request_id, int(index) if index.isdigit() else 0
