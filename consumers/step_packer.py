"""The packer of the on-policy variants: lets packs leave as they fill where the variant allows it, and seals
the step when all its rollouts are there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker_schemas.broker.packer_door import PackCommit, PackerDoor, PendingDescriptor, PlannedPack
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.status import OpenStep, read_status
from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack
from consumers.fill_warning import FillWarning
from consumers.metrics import PackerMetrics
from consumers.packing import PackingError
from consumers.step_plans import PackList, StepPlan

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
    """One packer process. Raises RunStopped for a step that cannot be packed: nothing else would help.

    ``filled`` finds the packs that may leave before their step is
    complete; None where the plan needs all of its rollouts.
    """

    def __init__(
        self,
        door: PackerDoor,
        plan: Planner,
        metrics: PackerMetrics,
        settings: StepPackerSettings,
        filled: Callable[[Sequence[int]], PackList] | None = None,
    ) -> None:
        self._door = door
        self._plan = plan
        self._filled = filled
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
        num_missing = open_step.num_rollouts - open_step.packed_segments - len(own)
        if num_missing > 0:
            return self._let_filled_leave(open_step, own)
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

    def _let_filled_leave(self, open_step: OpenStep, own: Sequence[PendingDescriptor]) -> int:
        """Commit the packs that are full already, dealt to the ranks in turn; return how many there were."""
        if self._filled is None:
            return 0
        planned = [
            self._planned_pack(
                (open_step.packed_packs + place) % self._settings.world_size,
                [own[index] for index in indices],
            )
            for place, indices in enumerate(self._filled(_lengths(own)))
        ]
        if not planned:
            return 0
        commit = self._door.commit(
            planned, oldest_policy_version=0, queue_limit=0, open_step=open_step.optimizer_step
        )
        self._note(commit, planned, reason="filled")
        return commit.num_packs

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
            for rank, packs in enumerate(_after(plan, open_step.packed_packs))
            for indices in packs
            if indices
        ]
        commit = self._door.commit(
            planned, oldest_policy_version=0, queue_limit=0, sealed_step=open_step.optimizer_step
        )
        self._note(commit, planned, reason="sealed")
        if not commit.num_packs:
            return 0
        log.info(
            "packer: step %d sealed, %d packs, %d carried, %.0f ms",
            open_step.optimizer_step,
            commit.num_packs,
            len(self._held),
            1000 * (time.monotonic() - started_s),
        )
        return commit.num_packs

    def _note(self, commit: PackCommit, planned: Sequence[PlannedPack], *, reason: str) -> None:
        """Forget what is no longer pending, and count the packs that were made."""
        for name in commit.gone or [name for item in planned for name in item.pack.record_ids]:
            self._held.pop(name, None)
        for item in planned if commit.num_packs else ():
            self._metrics.on_pack(
                item.pack, reason=reason, is_underfilled=self._fill_warning.is_underfilled(item.pack, reason)
            )
        self._metrics.on_buffer(len(self._held))

    def _planned_pack(self, rank: int, items: Sequence[PendingDescriptor]) -> PlannedPack:
        pack = ReadyPack.of([item.descriptor for item in items], capacity=self._settings.capacity)
        return PlannedPack(rank=rank, pack=pack, entry_ids=tuple(item.entry_id for item in items))


def _after(plan: StepPlan, num_dealt: int) -> StepPlan:
    """Give the ranks that got fewer of the packs that left before more of those that are left."""
    num_ranks = len(plan)
    first = num_dealt % num_ranks
    by_need = [(first + place) % num_ranks for place in range(num_ranks)]
    fullest = sorted(plan, key=len, reverse=True) if num_dealt else plan
    dealt: StepPlan = [[] for _ in plan]
    for rank, packs in zip(by_need, fullest, strict=True):
        dealt[rank] = packs
    return dealt


def _lengths(items: Sequence[PendingDescriptor]) -> list[int]:
    return [item.descriptor.encoded_length for item in items]


def _request_order(item: PendingDescriptor) -> tuple[str, int]:
    request_id, _, index = item.descriptor.record_id.rpartition(".")
    return request_id, int(index) if index.isdigit() else 0
