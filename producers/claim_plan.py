"""Who takes which claim: what is under way laid out over the coming claims, and what they leave free.

Pure. Units are segments; a claim takes GA packs of each rank.

The rule. Let K be `sync_every_steps`, w `version_window`, l `producer_lag_versions` and s the number of
committed optimizer steps. The policy version during step t is t // K. What is requested during step s has
version s // K - l at the lowest, is ready for the claims from step a(s) = s + `generation_steps` on, and may
be claimed before step d(s) = K (s // K + w - l + 1). Claims take the lowest versions first, so a claim order
by deadline: what is under way keeps its claims whatever is asked for later, and a new request has what is
left of the claims from a(s) to d(s). Nothing under way is charged against a claim that it cannot reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.schedule import ExactRatio, is_rollout_step

ROUNDING: Final = 1e-9
"""Sums of packs are whole numbers but for the last bits."""


@dataclass(frozen=True, kw_only=True)
class ClaimRule:
    """What decides when something may be claimed; see the rule above."""

    b_ratio: ExactRatio
    sync_every_steps: int
    version_window: int
    producer_lag_versions: int

    def deadline_step(self, requested_step: int) -> int:
        """Return d(s): the first step that must not claim what was requested during this one."""
        num_versions = self.version_window - self.producer_lag_versions + 1
        return self.sync_every_steps * (requested_step // self.sync_every_steps + num_versions)

    def deadline_of(self, policy_version: int) -> int:
        """Return the first step whose claim must not take this version."""
        return self.sync_every_steps * (policy_version + self.version_window + 1)

    def oldest_at(self, optimizer_step: int) -> int:
        """Return the lowest policy version that the claim of this step may take."""
        return oldest_allowed(optimizer_step // self.sync_every_steps, self.version_window)


@dataclass(frozen=True, kw_only=True)
class Lot:
    """Segments that can be claimed from ``ready_step`` to ``deadline_step`` - 1.

    ``rank`` holds them in a ready pack; None: it is open who gets them.
    """

    ready_step: int
    deadline_step: int
    num_segments: float
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class FreePlaces:
    """Segments that each claim a new request reaches has room for, in order of the claims."""

    by_claim: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.by_claim)

    @property
    def first(self) -> float:
        """Room of the first claim; 0 where the request reaches none."""
        return self.by_claim[0] if self.by_claim else 0.0


def free_places(
    rule: ClaimRule,
    lots: Sequence[Lot],
    *,
    next_claim_step: int,
    reachable: range,
    world_size: int,
    segments_per_claim: float,
    least_segments_per_claim: float,
) -> FreePlaces:
    """Return what the claims of the steps in ``reachable`` leave for a request made now.

    A claim is made when ``least_segments_per_claim`` are there for each rank for sure, and then takes
    ``segments_per_claim``; else it is skipped and takes nothing. Empty where no B step lies in ``reachable``.
    """
    ordered = sorted(lots, key=lambda lot: lot.deadline_step)
    left = [lot.num_segments for lot in ordered]
    by_claim = []
    for step in range(next_claim_step, max(reachable.stop, next_claim_step)):
        if not is_rollout_step(step, rule.b_ratio):
            continue
        there = [at for at, lot in enumerate(ordered) if lot.ready_step <= step < lot.deadline_step]
        taken, places = _claim(ordered, left, there, world_size, segments_per_claim)
        if step in reachable:
            by_claim.append(sum(places))
        if max(places) <= segments_per_claim - least_segments_per_claim + ROUNDING:
            left = [there_now - gone for there_now, gone in zip(left, taken, strict=True)]
    return FreePlaces(by_claim=tuple(by_claim))


def _claim(
    lots: Sequence[Lot], left: Sequence[float], there: Sequence[int], world_size: int, wanted: float
) -> tuple[list[float], list[float]]:
    """Return what a claim takes of each lot, earliest deadline first, and the places left on each rank."""
    places = [wanted] * world_size
    held = [0.0] * world_size
    for at in there:
        rank = lots[at].rank
        if rank is not None:
            held[rank] += left[at]
    taken = [0.0] * len(lots)
    for at in there:
        owner = lots[at].rank
        # whoever holds least needs it most: the packer gives the next pack to that rank
        ranks = [owner] if owner is not None else sorted(range(world_size), key=lambda rank: held[rank])
        for rank in ranks:
            some = min(places[rank], left[at] - taken[at])
            places[rank] -= some
            taken[at] += some
    return taken, places


@lru_cache(maxsize=256)
def unreachable_share(rule: ClaimRule, generation_steps: int) -> float:
    """Return the share of B steps that no request could serve fresh, however early or late it is made.

    The claim of step t is served by what is requested during step t - G, the last that is ready for it; it is
    stale by then iff t has reached its deadline. Both repeat with the schedule and the publications.
    """
    period = rule.sync_every_steps * 100
    steps = [step for step in range(period, 2 * period) if is_rollout_step(step, rule.b_ratio)]
    missed = [step for step in steps if step >= rule.deadline_step(max(0, step - generation_steps))]
    return len(missed) / len(steps) if steps else 0.0


def sufficient_window(rule: ClaimRule, generation_steps: int) -> int:
    """Return the smallest `version_window` with which every B step could be served fresh."""
    return -(-generation_steps // rule.sync_every_steps) + rule.producer_lag_versions
