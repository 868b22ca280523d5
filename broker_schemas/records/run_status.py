"""What a look at a run shows: lengths, sums and versions, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OpenStep:
    """The optimizer step for which rollouts are wanted (on-policy variants).

    ``carried`` matched segments were there before it; ``sealed`` is 1 when its packs are complete.
    ``packed_segments`` of it left in ``packed_packs`` packs that filled before that.
    """

    optimizer_step: int
    policy_version: int
    num_rollouts: int
    carried: int
    sealed: int
    packed_segments: int = 0
    packed_packs: int = 0


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Counts are records unless said otherwise. ``counters`` are the running sums of the log.

    ``ready_versions`` are the policy versions of each rank's ready packs, where they were asked for.
    ``demand_advice`` is what the dispatcher says where no demand could serve the B steps fresh.
    """

    policy_version: int
    ready_depths: tuple[int, ...]
    segments_waiting: int
    matched_waiting: int
    open_claims: int
    counters: Mapping[str, int]
    open_step: OpenStep | None
    ready_versions: tuple[tuple[int, ...], ...] = ()
    demand_advice: str = ""

    def total(self, name: str) -> int:
        """Return a running sum, 0 where nothing was counted yet."""
        return self.counters.get(name, 0)

    def by_reason(self, name: str) -> dict[str, int]:
        """Return the sums of ``dropped`` or ``rejected`` by reason."""
        start = name + ":"
        return {
            key.removeprefix(start): value for key, value in self.counters.items() if key.startswith(start)
        }

    @property
    def outstanding(self) -> int:
        """Rollouts asked for to train, and not yet matched, rejected or dropped."""
        return self.total("open_records") + self.segments_waiting - self.total("evaluation_waiting")

    @property
    def evaluation_outstanding(self) -> int:
        """Rollouts asked for to evaluate, and not yet answered, rejected or given up."""
        return self.total("evaluation_open_records") + self.total("evaluation_waiting")
