"""Watches how requests turn into packs: the estimates that demand control needs. Pure: fed, never looks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from broker_schemas.broker.status import RunStatus
from producers.claim_plan import unreachable_share
from producers.demand import DemandSettings, DemandState, claimable_packs

NUM_RECENT = 16
MAX_GENERATION_STEPS = 64


@dataclass
class DemandTracker:
    """Keeps when rollouts were asked for, how long matched ones were, how many segments recent packs held.

    How many segments fill a pack of ``capacity_tokens`` follows from their lengths, not from the packs that
    were made: those are small where rollouts are few, and fewer still would be asked for.
    ``start_segments_per_pack`` is used until some were matched. Rollouts are taken to come back in the order
    in which they were asked for; where they do not, the estimates err to the careful side.
    """

    start_segments_per_pack: float
    capacity_tokens: int
    _issued: deque[tuple[int, int]] = field(default_factory=deque)  # (rollouts asked for in all, at step)
    _generation_steps: deque[int] = field(default_factory=lambda: deque([1], maxlen=NUM_RECENT))
    _per_pack: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    _packed_before: tuple[int, int] = (0, 0)
    _matched: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    _matched_before: tuple[int, int] = (0, 0)

    def on_issued(self, total_requested: int, optimizer_step: int) -> None:
        """Note that ``total_requested`` rollouts have been asked for by now."""
        self._issued.append((total_requested, optimizer_step))

    def observe(self, status: RunStatus, settings: DemandSettings) -> DemandState:
        """Return the demand state of ``status``, which has ``ready_versions``, and learn from it."""
        optimizer_step = status.total("committed_steps")
        is_step_decided = status.total("steps:A") + status.total("steps:B") > optimizer_step
        resolved = status.total("requested") - status.outstanding
        while self._issued and self._issued[0][0] <= resolved:
            _, asked_at = self._issued.popleft()
            self._generation_steps.append(min(max(1, optimizer_step - asked_at + 1), MAX_GENERATION_STEPS))
        self._learn_pack_sizes(status)
        self._learn_lengths(status)
        full = self._segments_in_a_full_pack()
        return DemandState(
            optimizer_step=optimizer_step,
            is_step_decided=is_step_decided,
            num_outstanding_rollouts=max(0, status.outstanding),
            num_matched_segments=status.matched_waiting,
            ready_packs_per_rank=claimable_packs(
                status.ready_versions, optimizer_step + is_step_decided, settings
            ),
            segments_per_pack=full,
            least_segments_per_pack=min([full, *self._per_pack]),
            generation_steps=self._generation_estimate(status, settings),
            oldest_outstanding_optimizer_step=self._issued[0][1] if self._issued else None,
            outstanding_by_step=self._outstanding_by_step(status, optimizer_step),
            ready_versions=status.ready_versions,
        )

    @property
    def typical_generation_steps(self) -> int:
        """What three of four of the late ones stayed within."""
        return sorted(self._generation_steps)[3 * (len(self._generation_steps) - 1) // 4]

    @property
    def slowest_generation_steps(self) -> int:
        """The slowest of late: optimizer steps from a request to the claim that its rollouts can join."""
        return max(self._generation_steps)

    def _outstanding_by_step(self, status: RunStatus, optimizer_step: int) -> tuple[tuple[int, int], ...]:
        """Return how many of each step's requests are outstanding; what nobody noted here was asked for now.

        A dispatcher that was started again knows nothing of what it asked for before.
        """
        before = status.total("requested") - max(0, status.outstanding)
        found: dict[int, int] = {}
        for total_requested, step in self._issued:
            found[step] = found.get(step, 0) + max(0, total_requested - before)
            before = max(before, total_requested)
        unknown = status.total("requested") - before
        if unknown > 0:
            found[optimizer_step] = found.get(optimizer_step, 0) + unknown
        return tuple(sorted(found.items()))

    def _generation_estimate(self, status: RunStatus, settings: DemandSettings) -> int:
        """Return the slowest of late with which something can be fresh, but 1 while nothing is under way.

        A straggler that cannot be fresh must not stop those that can: while most of the late ones were quick
        enough, the slowest of these counts, and what comes later than that is dropped as stale. A slow start
        could forbid every further request, and with none there would be no new measure: an empty pipeline
        therefore asks once more.
        """
        under_way = status.outstanding + status.matched_waiting + sum(status.ready_depths)
        if not under_way:
            return 1
        quick_enough = [
            steps for steps in self._generation_steps if unreachable_share(settings.claim_rule, steps) < 1
        ]
        if 2 * len(quick_enough) > len(self._generation_steps):
            return max(quick_enough)
        return self.slowest_generation_steps

    def _learn_pack_sizes(self, status: RunStatus) -> None:
        packs, segments = status.total("packed"), status.total("packed_segments")
        new_packs, new_segments = packs - self._packed_before[0], segments - self._packed_before[1]
        if new_packs > 0:
            self._per_pack.append(max(1.0, new_segments / new_packs))
            self._packed_before = (packs, segments)

    def _learn_lengths(self, status: RunStatus) -> None:
        matched, tokens = status.total("matched"), status.total("matched_tokens")
        new_matched, new_tokens = matched - self._matched_before[0], tokens - self._matched_before[1]
        if new_matched > 0 and new_tokens > 0:
            self._matched.append((new_matched, new_tokens))
        self._matched_before = (matched, tokens)

    def _segments_in_a_full_pack(self) -> float:
        if not self._matched:
            return self.start_segments_per_pack
        mean_tokens = sum(tokens for _, tokens in self._matched) / sum(num for num, _ in self._matched)
        return max(1.0, self.capacity_tokens / mean_tokens)
