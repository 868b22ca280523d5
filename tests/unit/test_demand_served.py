"""Demand control against a just-in-time policy: how many B steps are served, and that nothing goes stale."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from producers.claim_plan import sufficient_window, unreachable_share
from producers.demand import DemandSettings, DemandState, decide_demand
from producers.freshness_advice import freshness_advice
from tests.builders.demand_simulation import Simulation, a_simulation

LEAST_SERVED = 0.95
DEFAULTS = DemandSettings(
    world_size=1,
    gradient_accumulation_steps=2,
    prefetch_target_packs=4,
    version_window=2,
    sync_every_steps=1,
    b_ratio=Fraction(1),
    rollouts_per_request=8,
)


def steady(settings: DemandSettings, generation_steps: int, policy: str) -> Simulation:
    """Return a run in which every rollout takes as long as any other."""
    ticks_a_step = 4
    num_ticks = (generation_steps - 1) * ticks_a_step + 1
    return Simulation(
        settings=settings,
        generator=random.Random(0),
        segments_per_pack=4,
        quickest_ticks=num_ticks,
        slowest_ticks=num_ticks,
        quickest_step_ticks=ticks_a_step,
        num_workers=10_000,
        is_ordered=True,
        policy=policy,  # type: ignore[arg-type]
    )


@pytest.mark.req("Q-16")
@pytest.mark.parametrize(
    ("b_ratio", "window", "sync", "generation_steps", "num_served"),
    [
        (Fraction(1), 2, 1, 2, 198),
        (Fraction(1), 3, 1, 3, 197),
        (Fraction(1, 2), 2, 1, 2, 99),
        (Fraction(1), 1, 4, 3, 197),
    ],
)
def test_what_a_just_in_time_policy_serves_is_served(
    b_ratio: Fraction, window: int, sync: int, generation_steps: int, num_served: int
) -> None:
    settings = replace(DEFAULTS, b_ratio=b_ratio, version_window=window, sync_every_steps=sync)
    oracle = steady(settings, generation_steps, "just_in_time")
    oracle.run(200)
    assert oracle.num_claimed == num_served  # by hand: all but those of the first G steps

    run = steady(settings, generation_steps, "demand")
    run.run(200)

    assert run.num_claimed >= num_served  # the first claims may come a step sooner
    assert not run.stale


def compare(seeds: range) -> tuple[int, int]:
    """Return B steps served by demand control and by the oracle over the seeds; nothing may be stale."""
    served = by_oracle = 0
    for seed in seeds:
        run = replace(a_simulation(seed), is_ordered=True)
        oracle = replace(a_simulation(seed), is_ordered=True, policy="just_in_time")
        for simulation in (run, oracle):
            simulation.run(120)
        for rollout, stale_at_step in run.stale:
            failed = [s for s in run.skipped_steps if rollout.arrival_step <= s < stale_at_step]
            assert failed, (seed, rollout, stale_at_step)
        if oracle.num_servable:
            served += run.num_claimed
            by_oracle += oracle.num_claimed
            assert run.num_claimed >= LEAST_SERVED * oracle.num_claimed - 1, seed
    return served, by_oracle


@pytest.mark.req("Q-16", "Q-5")
def test_over_random_settings_95_percent_are_served_and_nothing_is_stale() -> None:
    served, by_oracle = compare(range(80))

    assert by_oracle > 2_000
    assert served >= LEAST_SERVED * by_oracle


@pytest.mark.req("Q-16")
def test_what_is_in_flight_is_not_charged_against_claims_that_only_later_requests_can_reach() -> None:
    # what was asked for a step ago is for the claim of step 11, what is asked for now for that of step 12
    state = DemandState(
        optimizer_step=10,
        is_step_decided=True,
        generation_steps=2,
        num_outstanding_rollouts=8,
        num_matched_segments=0,
        ready_packs_per_rank=(0,),
        segments_per_pack=4.0,
        least_segments_per_pack=4.0,
        outstanding_by_step=((9, 8),),
        ready_versions=((),),
    )
    assert decide_demand(state, DEFAULTS).num_rollouts == 8

    full = replace(state, num_outstanding_rollouts=16, outstanding_by_step=((9, 8), (10, 8)))
    assert decide_demand(full, DEFAULTS).limited_by == "freshness_reached"


@pytest.mark.req("Q-16")
@pytest.mark.parametrize(
    ("window", "sync", "generation_steps", "share", "sufficient"),
    [(2, 1, 2, 0.0, 2), (2, 1, 3, 1.0, 3), (1, 4, 5, 0.25, 2), (0, 4, 2, 0.5, 1), (0, 1, 0, 0.0, 0)],
)
def test_claims_that_no_request_can_reach_are_counted_and_the_window_that_would_do_is_named(
    window: int, sync: int, generation_steps: int, share: float, sufficient: int
) -> None:
    rule = replace(DEFAULTS, version_window=window, sync_every_steps=sync).claim_rule

    assert unreachable_share(rule, generation_steps) == share
    assert sufficient_window(rule, generation_steps) == sufficient
    enough = replace(rule, version_window=sufficient)
    assert unreachable_share(enough, generation_steps) == 0.0


@pytest.mark.req("Q-16")
def test_where_freshness_cannot_suffice_the_setting_to_change_is_named() -> None:
    assert freshness_advice(DEFAULTS.claim_rule, 2) == ""

    said = freshness_advice(DEFAULTS.claim_rule, 4)

    assert said.startswith("100% of the B steps cannot be served fresh")
    assert "set stage2_async.version_window to 4" in said
