"""Says how many rollout requests to issue now: enough to feed the learner, no more than can still be fresh.

Pure arithmetic over what is in the pipeline; it must not know the broker, the clock or the configuration.

The freshness bound. `claim_plan` lays what is under way over the coming claims, lowest version first, as the
claims take it; a request made now may fill what is left of those claims that it reaches while it is fresh.
Requests in flight are known step by step (`outstanding_by_step`). Where they are not, the whole pipeline is
held under the smallest bound of all steps at which a request in flight was issued, which is safe in any order
of arrival and asks for too little.

The bound counts packs and relies on the smallest ones. Where it leaves room for the packs of just one or two
steps, that many small packs would be too few rollouts to make the step's packs at all, and all of them would
go stale in a skipped step. So what fills the packs of the first claim that can be reached is asked for
wherever that claim has room for it; a few segments that do not get into them may then miss their bound.

Exact selection lets a younger segment overtake an older one inside the pack buffer, though never the oldest;
such a segment can miss its bound. It is then dropped as stale and counted.

The aim. What is requested during step s is ready by step a(s); from the next claim until then each rank takes
GA (B(a) - B(next claim)) packs. A pipeline of `prefetch_target_packs` and that many packs more leaves the
target depth at every claim.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from broker_schemas.records.schedule import next_rollout_step, num_rollout_steps
from producers.claim_plan import ROUNDING, ClaimRule, FreePlaces, Lot, free_places

DemandLimit = Literal["aim", "freshness", "aim_reached", "freshness_reached"]


@dataclass(frozen=True, kw_only=True)
class DemandSettings:
    """What stays the same during a run."""

    world_size: int
    """Learner ranks (W)."""
    gradient_accumulation_steps: int
    """Packs that each rank claims in a rollout step (GA)."""
    prefetch_target_packs: int
    """Ready packs per rank to aim at, seen just before a claim; at least GA."""
    version_window: int
    """A segment may be claimed while its policy version is at least current - `version_window`."""
    sync_every_steps: int
    """Optimizer steps between two publications of weights."""
    b_ratio: Fraction
    """Exact share of rollout steps, above 0 and at most 1."""
    rollouts_per_request: int
    """Rollouts in one request (one generation chunk, one job)."""
    producer_lag_versions: int = 0
    """How many versions behind the current one a rollout may start: 0 with a strict sync, 1 when weights are
    fetched while producers go on."""

    def __post_init__(self) -> None:
        for name, least in _LEAST_SETTINGS.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"demand setting {name}: got {getattr(self, name)}, expected at least {least}"
                )
        if not isinstance(self.b_ratio, Fraction) or not 0 < self.b_ratio <= 1:
            raise ValueError(
                f"demand setting b_ratio: got {self.b_ratio!r}, expected a Fraction above 0 and at most 1"
            )
        if self.prefetch_target_packs < self.gradient_accumulation_steps:
            raise ValueError(
                f"demand setting prefetch_target_packs: got {self.prefetch_target_packs}, expected at "
                f"least the {self.gradient_accumulation_steps} packs of one step"
            )

    @property
    def claim_rule(self) -> ClaimRule:
        """When something may be claimed."""
        return ClaimRule(
            b_ratio=self.b_ratio,
            sync_every_steps=self.sync_every_steps,
            version_window=self.version_window,
            producer_lag_versions=self.producer_lag_versions,
        )


@dataclass(frozen=True, kw_only=True)
class DemandState:
    """What is in the pipeline now."""

    optimizer_step: int
    """Committed optimizer steps; weights are published after every `sync_every_steps`-th."""
    is_step_decided: bool
    """Whether the packs of step `optimizer_step` are claimed (or skipped) already, so that it takes no
    more."""
    num_outstanding_rollouts: int
    """Requested and not yet matched, rejected or dropped."""
    num_matched_segments: int
    """Matched and not yet in a pack."""
    ready_packs_per_rank: tuple[int, ...]
    """Ready packs for each rank that the next claim can take; see `claimable_packs`."""
    segments_per_pack: float
    """Segments that fill a pack: a start value, then measured; decides how much is asked for."""
    least_segments_per_pack: float
    """Fewest segments that recent packs held; the bound on freshness relies on it."""
    generation_steps: int
    """Upper estimate of G, where a rollout requested during step s is in a ready pack for the claim of step s
    + G; at least 1, except where the claim of step s waits for it."""
    oldest_outstanding_optimizer_step: int | None = None
    """`optimizer_step` at which the oldest outstanding rollout was requested; None when there is none."""
    outstanding_by_step: tuple[tuple[int, int], ...] | None = None
    """(`optimizer_step` at the request, outstanding rollouts of it), oldest first; None: not known."""
    ready_versions: tuple[tuple[int, ...], ...] | None = None
    """Policy versions of each rank's ready packs; None: not known, all of the current one."""

    def __post_init__(self) -> None:
        counts = (
            self.optimizer_step,
            self.num_outstanding_rollouts,
            self.num_matched_segments,
            self.generation_steps,
        )
        if min(*counts, *self.ready_packs_per_rank) < 0:
            raise ValueError(f"demand state: got a negative number in {self}, expected 0 or more")
        if not 0 < self.least_segments_per_pack <= self.segments_per_pack:
            raise ValueError(
                f"segments per pack: got least {self.least_segments_per_pack} and full "
                f"{self.segments_per_pack}, expected 0 < least <= full"
            )


@dataclass(frozen=True, kw_only=True)
class DemandDecision:
    """How many requests to issue, and what held the number down."""

    num_rollouts: int
    """Rollouts to request now: whole requests, unless freshness allows only part of the last one."""
    rollouts_per_request: int
    """Rollouts in one whole request."""
    limited_by: DemandLimit
    """`aim` or `freshness` decided the number; with the suffix `_reached` it is 0."""

    @property
    def request_sizes(self) -> tuple[int, ...]:
        """Rollouts of each request to issue; only the last can be smaller than the others."""
        num_whole, rest = divmod(self.num_rollouts, self.rollouts_per_request)
        return (self.rollouts_per_request,) * num_whole + ((rest,) if rest else ())


def requests_to_issue(state: DemandState, settings: DemandSettings) -> int:
    """Return how many requests to issue now, 0 when enough is under way; `decide_demand` has their sizes."""
    return len(decide_demand(state, settings).request_sizes)


def decide_demand(state: DemandState, settings: DemandSettings) -> DemandDecision:
    """Weigh the aim, rounded up to whole requests, against the freshness bound.

    The bound is exceeded only to fill the packs of one step.

    A last request may be smaller than the others: rounding down could leave a step short of rollouts for
    ever. Raises `ValueError` when the state's ranks are not `world_size` many.
    """
    if len(state.ready_packs_per_rank) != settings.world_size:
        raise ValueError(
            f"ready_packs_per_rank: got {len(state.ready_packs_per_rank)} ranks, "
            f"expected {settings.world_size}"
        )
    num_pending = state.num_outstanding_rollouts + state.num_matched_segments
    aim_packs = _missing_packs(state, _aim_level(state, settings))
    num_aimed = max(0, math.ceil(aim_packs * state.segments_per_pack) - num_pending)
    num_fresh = max(0, _num_fresh(state, settings))
    chunk = settings.rollouts_per_request
    num_whole = -(-num_aimed // chunk) * chunk
    num_rollouts = min(num_whole, num_fresh)
    if state.outstanding_by_step is not None:
        num_rollouts = _in_whole_packs(num_rollouts, num_fresh, num_pending, state.segments_per_pack)
    if num_whole <= num_fresh:
        limited_by: DemandLimit = "aim" if num_rollouts else "aim_reached"
    else:
        limited_by = "freshness" if num_rollouts else "freshness_reached"
    return DemandDecision(num_rollouts=num_rollouts, rollouts_per_request=chunk, limited_by=limited_by)


def _in_whole_packs(num_rollouts: int, at_most: int, num_pending: int, segments_per_pack: float) -> int:
    """Return as many, or a few more or less, that fill packs together with what is pending.

    What is left of a pack waits for younger rollouts, and its oldest segment may be stale by then.
    """
    if num_rollouts == 0:
        return 0
    num_packs = math.ceil((num_pending + num_rollouts) / segments_per_pack - ROUNDING)
    if math.ceil(num_packs * segments_per_pack - ROUNDING) - num_pending > at_most:
        num_packs -= 1
    return min(at_most, max(0, math.ceil(num_packs * segments_per_pack - ROUNDING) - num_pending))


def _num_fresh(state: DemandState, settings: DemandSettings) -> int:
    """Rollouts that may be requested now because the claims that they reach have room for them."""
    if state.outstanding_by_step is not None:
        sure = _places(state, settings, state.least_segments_per_pack)
        full = _places(state, settings, state.segments_per_pack)
        return max(math.floor(sure.total + ROUNDING), math.ceil(full.first - ROUNDING))
    num_pending = state.num_outstanding_rollouts + state.num_matched_segments
    level = freshness_level(state, settings)
    num_allowed = max(
        math.floor(_missing_packs(state, level) * state.least_segments_per_pack),
        _one_step(state, settings) if level >= settings.gradient_accumulation_steps else 0,
    )
    return num_allowed - num_pending


def _places(state: DemandState, settings: DemandSettings, segments_per_pack: float) -> FreePlaces:
    now, rule = state.optimizer_step, settings.claim_rule
    next_claim_step = now + state.is_step_decided
    matched = Lot(
        ready_step=next_claim_step,
        deadline_step=rule.deadline_step(now),
        num_segments=state.num_matched_segments,
    )
    current = (now // settings.sync_every_steps,)
    ready = state.ready_versions or [current * depth for depth in state.ready_packs_per_rank]
    lots = [
        Lot(
            ready_step=next_claim_step,
            deadline_step=rule.deadline_of(version),
            num_segments=segments_per_pack * num_packs,
            rank=rank,
        )
        for rank, versions in enumerate(ready)
        for version, num_packs in sorted(Counter(versions).items())
    ]
    # what has outlived its estimate may come any moment: it is reckoned with at once
    lots += [
        Lot(
            ready_step=max(next_claim_step, step + state.generation_steps),
            deadline_step=rule.deadline_step(step),
            num_segments=num,
        )
        for step, num in state.outstanding_by_step or ()
    ]
    per_claim = settings.gradient_accumulation_steps
    return free_places(
        rule,
        [*lots, matched],
        next_claim_step=next_claim_step,
        reachable=range(now + state.generation_steps, rule.deadline_step(now)),
        world_size=settings.world_size,
        segments_per_claim=per_claim * segments_per_pack,
        least_segments_per_claim=per_claim * state.least_segments_per_pack,
    )


def freshness_level(state: DemandState, settings: DemandSettings) -> int:
    """Return how many packs per rank the whole pipeline may hold so
    that each is claimed fresh; 0 if none can be.

    A step at which nothing could be issued does not count among those of requests in flight.
    """
    level = _claimable_packs(state.optimizer_step, state.generation_steps, settings)
    oldest = state.oldest_outstanding_optimizer_step
    if oldest is None:
        return level
    # A request older than generation_steps has outlived its estimate: its own bound can no longer be kept.
    first = max(oldest, state.optimizer_step - state.generation_steps)
    earlier = (
        _claimable_packs(step, state.generation_steps, settings)
        for step in range(first, state.optimizer_step)
    )
    return min([level, *(packs for packs in earlier if packs)])


def _claimable_packs(requested_step: int, generation_steps: int, settings: DemandSettings) -> int:
    """Packs per rank that the schedule claims while a rollout
    requested before this step is ready and fresh."""
    deadline_step = settings.claim_rule.deadline_step(requested_step)
    return _scheduled_packs(requested_step + generation_steps, deadline_step, settings)


def _aim_level(state: DemandState, settings: DemandSettings) -> int:
    next_claim_step = state.optimizer_step + state.is_step_decided
    arrival_step = state.optimizer_step + state.generation_steps
    return settings.prefetch_target_packs + _scheduled_packs(next_claim_step, arrival_step, settings)


def _scheduled_packs(start_step: int, end_step: int, settings: DemandSettings) -> int:
    if end_step <= start_step:
        return 0
    before, by_then = (num_rollout_steps(step, settings.b_ratio) for step in (start_step, end_step))
    return (by_then - before) * settings.gradient_accumulation_steps


def _one_step(state: DemandState, settings: DemandSettings) -> int:
    """Segments that fill the packs of one rollout step, as far as they are not ready."""
    missing = _missing_packs(state, settings.gradient_accumulation_steps)
    return math.ceil(missing * state.segments_per_pack)


def claimable_packs(
    ready_versions: tuple[tuple[int, ...], ...], next_claim_step: int, settings: DemandSettings
) -> tuple[int, ...]:
    """Return how many of each rank's ready packs are still fresh when the next rollout step claims them.

    ``ready_versions`` are the policy versions of each rank's packs. Those that will be stale by then are no
    supply: counted as such, they would leave that step short.
    """
    claim_step = next_rollout_step(next_claim_step, settings.b_ratio)
    oldest = settings.claim_rule.oldest_at(claim_step)
    return tuple(sum(version >= oldest for version in versions) for versions in ready_versions)


def _missing_packs(state: DemandState, level: int) -> int:
    """Packs needed to bring every rank up to the level; the packer always serves the emptiest rank first."""
    return sum(max(0, level - depth) for depth in state.ready_packs_per_rank)


_LEAST_SETTINGS: Final = {
    "world_size": 1,
    "gradient_accumulation_steps": 1,
    "prefetch_target_packs": 1,
    "version_window": 0,
    "sync_every_steps": 1,
    "rollouts_per_request": 1,
    "producer_lag_versions": 0,
}
