"""A run in the small: producers, a packer and learner ranks in lock step, asking for rollouts by a policy."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from learner.schedule import is_rollout_step
from producers.demand import DemandSettings, DemandState, decide_demand


@dataclass(kw_only=True, eq=False)
class Rollout:
    """One simulated rollout and what became of it."""

    requested_step: int
    policy_version: int
    num_ticks_left: int
    arrival_step: int = -1


@dataclass(kw_only=True)
class Simulation:
    """Producers, one packer in arrival order, and ranks in lock step; times are random.

    A rollout takes at most `slowest_ticks` from its request, a step at least `quickest_step_ticks`.
    """

    settings: DemandSettings
    generator: random.Random
    segments_per_pack: int
    slowest_ticks: int
    quickest_step_ticks: int
    num_workers: int
    policy: Literal["demand", "just_in_time"] = "demand"
    is_ordered: bool = False
    """Each claim takes the lowest versions there are [P-13]; requests in flight are known step by step."""
    optimizer_step: int = 0
    in_flight: list[Rollout] = field(default_factory=list)
    matched: list[Rollout] = field(default_factory=list)
    ready: list[list[list[Rollout]]] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    stale: list[tuple[Rollout, int]] = field(default_factory=list)
    depths_at_claim: list[int] = field(default_factory=list)
    num_claimed: int = 0
    num_requested: int = 0
    num_freshness_limited: int = 0
    num_servable: int = 0
    quickest_ticks: int = 1

    def __post_init__(self) -> None:
        self.ready = [[] for _ in range(self.settings.world_size)]

    @property
    def policy_version(self) -> int:
        return self.optimizer_step // self.settings.sync_every_steps

    @property
    def generation_steps(self) -> int:
        """A step may end with the tick of the request; after that every step takes its quickest time."""
        return 1 - (1 - self.slowest_ticks) // self.quickest_step_ticks

    def state(self) -> DemandState:
        return DemandState(
            optimizer_step=self.optimizer_step,
            is_step_decided=True,
            num_outstanding_rollouts=len(self.in_flight),
            num_matched_segments=len(self.matched),
            ready_packs_per_rank=tuple(len(packs) for packs in self.ready),
            segments_per_pack=float(self.segments_per_pack),
            least_segments_per_pack=float(self.segments_per_pack),
            generation_steps=self.generation_steps,
            oldest_outstanding_optimizer_step=min((r.requested_step for r in self.in_flight), default=None),
            outstanding_by_step=self.ledger() if self.is_ordered else None,
            ready_versions=tuple(tuple(lowest_version(pack) for pack in packs) for packs in self.ready)
            if self.is_ordered
            else None,
        )

    def ledger(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(Counter(rollout.requested_step for rollout in self.in_flight).items()))

    def request(self) -> None:
        if self.policy == "just_in_time":
            return
        decision = decide_demand(self.state(), self.settings)
        self.num_freshness_limited += decision.limited_by.startswith("freshness")
        self.issue(decision.num_rollouts)

    def request_just_in_time(self) -> None:
        """Ask at the last moment for exactly what one claim takes, where it can be fresh."""
        settings, step = self.settings, self.optimizer_step
        claim_step = step + self.generation_steps
        age = claim_step // settings.sync_every_steps - step // settings.sync_every_steps
        if not is_rollout_step(claim_step, settings.b_ratio):
            return
        if age + settings.producer_lag_versions <= settings.version_window:
            self.num_servable += 1
            self.issue(settings.world_size * settings.gradient_accumulation_steps * self.segments_per_pack)

    def issue(self, num_rollouts: int) -> None:
        for _ in range(num_rollouts):
            self.num_requested += 1
            lag = self.generator.randint(0, self.settings.producer_lag_versions)
            self.in_flight.append(
                Rollout(
                    requested_step=self.optimizer_step,
                    policy_version=self.policy_version - lag,
                    num_ticks_left=self.generator.randint(self.quickest_ticks, self.slowest_ticks),
                )
            )

    def produce(self) -> None:
        """One tick: busy workers go on, finished rollouts are matched, full packs go to the emptiest rank."""
        for rollout in self.in_flight[: self.num_workers]:
            rollout.num_ticks_left -= 1
        arrived = [rollout for rollout in self.in_flight if rollout.num_ticks_left <= 0]
        self.in_flight = [rollout for rollout in self.in_flight if rollout.num_ticks_left > 0]
        self.generator.shuffle(arrived)
        for rollout in arrived:
            rollout.arrival_step = self.optimizer_step + 1  # it missed the claim of the step that runs
        self.matched += arrived
        if not self.is_ordered:
            self.pack()

    def pack(self) -> None:
        """Make full packs: all there are, or, ordered, what the claim lacks, of the lowest versions."""
        size = self.segments_per_pack
        if self.is_ordered:
            self.matched.sort(key=lambda rollout: rollout.policy_version)
        while len(self.matched) >= size and not (self.is_ordered and self.has_enough):
            pack, self.matched = self.matched[:size], self.matched[size:]
            min(self.ready, key=len).append(pack)

    @property
    def has_enough(self) -> bool:
        return min(len(packs) for packs in self.ready) >= self.settings.gradient_accumulation_steps

    def claim(self) -> None:
        """Drop stale packs, then claim for all ranks or skip, as the learner does."""
        settings = self.settings
        self.matched = [rollout for rollout in self.matched if self.is_fresh([rollout])]
        for rank in range(settings.world_size):
            self.ready[rank] = [pack for pack in self.ready[rank] if self.is_fresh(pack)]
        if self.is_ordered and is_rollout_step(self.optimizer_step, settings.b_ratio):
            self.pack()
        depth = min(len(packs) for packs in self.ready)
        s = self.optimizer_step
        if not is_rollout_step(s, settings.b_ratio):
            return
        self.depths_at_claim.append(depth)
        if depth < settings.gradient_accumulation_steps:
            self.skipped_steps.append(s)
            return
        for rank in range(settings.world_size):
            del self.ready[rank][: settings.gradient_accumulation_steps]
        self.num_claimed += 1

    def is_fresh(self, pack: list[Rollout]) -> bool:
        stale = [r for r in pack if r.policy_version < self.policy_version - self.settings.version_window]
        self.stale += [(rollout, self.optimizer_step) for rollout in stale]
        return not stale

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.claim()
            if self.policy == "just_in_time":
                self.request_just_in_time()
            num_ticks = self.quickest_step_ticks + self.generator.choice([0, 0, 1, 3])
            for _ in range(num_ticks):
                self.request()
                self.produce()
            self.optimizer_step += 1


def a_simulation(seed: int, **changes: object) -> Simulation:
    generator = random.Random(seed)
    accumulation = generator.randint(1, 3)
    settings = DemandSettings(
        world_size=generator.randint(1, 4),
        gradient_accumulation_steps=accumulation,
        prefetch_target_packs=accumulation + generator.randint(0, 4),
        version_window=generator.randint(0, 5),
        sync_every_steps=generator.randint(1, 4),
        b_ratio=Fraction(generator.randint(1, 10), 10),
        rollouts_per_request=generator.randint(1, 5),
        producer_lag_versions=generator.choice([0, 0, 1]),
    )
    return Simulation(
        settings=replace(settings, **changes),  # type: ignore[arg-type]
        generator=generator,
        segments_per_pack=generator.randint(1, 4),
        slowest_ticks=generator.randint(1, 12),
        quickest_step_ticks=generator.randint(2, 6),
        num_workers=10_000,
    )


def lowest_version(pack: list[Rollout]) -> int:
    return min(rollout.policy_version for rollout in pack)
