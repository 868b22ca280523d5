"""Demand control: the bound on freshness and the aim, by hand and in a simulated run."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from producers.demand import (
    DemandSettings,
    DemandState,
    decide_demand,
    freshness_level,
    requests_to_issue,
)
from tests.builders.demand_simulation import a_simulation

SETTINGS = DemandSettings(
    world_size=2,
    gradient_accumulation_steps=2,
    prefetch_target_packs=4,
    version_window=2,
    sync_every_steps=1,
    b_ratio=Fraction(1),
    rollouts_per_request=4,
)
STATE = DemandState(
    optimizer_step=10,
    is_step_decided=False,
    generation_steps=0,
    num_outstanding_rollouts=0,
    num_matched_segments=0,
    ready_packs_per_rank=(0, 0),
    segments_per_pack=3.0,
    least_segments_per_pack=3.0,
)


@pytest.mark.req("Q-16")
def test_an_empty_pipeline_is_filled_to_the_aim() -> None:
    assert requests_to_issue(STATE, SETTINGS) == 6  # 2 ranks x 4 packs x 3 segments / 4 rollouts


@pytest.mark.req("Q-16")
def test_what_is_outstanding_matched_or_ready_is_not_asked_for_again() -> None:
    state = replace(STATE, num_outstanding_rollouts=8, num_matched_segments=4, ready_packs_per_rank=(2, 1))

    assert decide_demand(state, SETTINGS).request_sizes == (4,)  # 5 packs missing: 15 - 12 = 3, rounded up


@pytest.mark.req("Q-16")
def test_packs_beyond_the_aim_on_one_rank_do_not_hide_the_lack_on_another() -> None:
    assert requests_to_issue(replace(STATE, ready_packs_per_rank=(8, 0)), SETTINGS) == 3
    assert requests_to_issue(replace(STATE, ready_packs_per_rank=(4, 4)), SETTINGS) == 0


@pytest.mark.req("Q-16")
def test_generation_that_takes_steps_is_covered_by_requests_in_flight() -> None:
    settings = replace(SETTINGS, version_window=9)

    decision = decide_demand(replace(STATE, generation_steps=3), settings)

    assert decision.num_rollouts == 60  # 2 ranks x (4 + 3 steps x 2) packs x 3 segments
    assert decision.limited_by == "aim"


@pytest.mark.req("Q-16")
def test_freshness_holds_the_number_down_and_the_last_request_may_be_smaller() -> None:
    settings = replace(SETTINGS, version_window=1)  # the claims of two steps are fresh: 4 packs a rank
    state = replace(STATE, least_segments_per_pack=2.7)

    decision = decide_demand(state, settings)

    assert decision.limited_by == "freshness"
    assert decision.request_sizes == (4, 4, 4, 4, 4, 1)  # floor(8 packs x 2.7)
    assert requests_to_issue(state, settings) == 6


@pytest.mark.req("Q-16")
def test_small_packs_of_late_do_not_leave_the_one_step_that_is_fresh_without_rollouts() -> None:
    settings = replace(SETTINGS, version_window=0)  # only the coming step's claim is fresh: 2 packs a rank
    state = replace(STATE, least_segments_per_pack=1.0)

    assert decide_demand(state, settings).num_rollouts == 12  # 4 packs x 3, not x 1
    one_ready = replace(state, ready_packs_per_rank=(1, 0), num_outstanding_rollouts=4)
    assert decide_demand(one_ready, settings).num_rollouts == 5  # 3 packs x 3, 4 are under way
    too_late = replace(state, generation_steps=2)
    assert decide_demand(too_late, settings).num_rollouts == 0


@pytest.mark.req("Q-16")
@pytest.mark.parametrize(
    ("sync_every_steps", "version_window", "optimizer_step", "generation_steps", "lag", "level"),
    [
        (1, 0, 10, 0, 0, 2),  # step 10 alone
        (1, 2, 10, 0, 0, 6),  # steps 10, 11, 12
        (1, 2, 10, 2, 0, 2),  # step 12
        (1, 2, 10, 3, 0, 0),  # ready when it is stale
        (4, 1, 8, 0, 0, 16),  # steps 8 to 15
        (4, 1, 11, 0, 0, 10),  # steps 11 to 15
        (4, 1, 11, 0, 1, 2),  # a rollout started on the version before: step 11
        (4, 0, 11, 1, 0, 0),
    ],
)
def test_the_bound_counts_the_packs_of_the_steps_at_which_a_new_rollout_is_ready_and_fresh(
    sync_every_steps: int,
    version_window: int,
    optimizer_step: int,
    generation_steps: int,
    lag: int,
    level: int,
) -> None:
    settings = replace(
        SETTINGS,
        sync_every_steps=sync_every_steps,
        version_window=version_window,
        producer_lag_versions=lag,
    )
    state = replace(STATE, optimizer_step=optimizer_step, generation_steps=generation_steps)

    assert freshness_level(state, settings) == level


@pytest.mark.req("Q-16")
def test_only_rollout_steps_of_the_schedule_count() -> None:
    settings = replace(SETTINGS, b_ratio=Fraction(1, 2), version_window=3)

    assert (
        freshness_level(replace(STATE, optimizer_step=10), settings) == 4
    )  # steps 10 to 13: 11 and 13 are B


@pytest.mark.req("Q-16")
def test_a_request_in_flight_that_has_less_time_left_holds_younger_ones_back() -> None:
    settings = replace(SETTINGS, sync_every_steps=4, version_window=0)
    state = replace(STATE, optimizer_step=8, generation_steps=1)
    assert freshness_level(state, settings) == 6  # claims of steps 9, 10, 11

    late = replace(state, num_outstanding_rollouts=1, oldest_outstanding_optimizer_step=7)
    assert freshness_level(late, settings) == 6  # nothing could be issued at step 7: it is no bound

    settings = replace(settings, version_window=1)
    assert freshness_level(state, settings) == 14
    assert freshness_level(late, settings) == 8  # requested at 7: claims of steps 8 to 11


@pytest.mark.req("Q-16")
def test_the_reason_for_asking_nothing_is_told() -> None:
    assert decide_demand(replace(STATE, ready_packs_per_rank=(4, 4)), SETTINGS).limited_by == "aim_reached"
    assert decide_demand(replace(STATE, generation_steps=9), SETTINGS).limited_by == "freshness_reached"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("world_size", 0),
        ("prefetch_target_packs", 1),
        ("version_window", -1),
        ("b_ratio", 0.5),
        ("b_ratio", Fraction(0)),
        ("rollouts_per_request", 0),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got .*, expected"):
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def test_states_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="negative number"):
        replace(STATE, num_outstanding_rollouts=-1)
    with pytest.raises(ValueError, match="expected 0 < least <= full"):
        replace(STATE, least_segments_per_pack=4.0)
    with pytest.raises(ValueError, match="got 2 ranks, expected 3"):
        requests_to_issue(STATE, replace(SETTINGS, world_size=3))


@pytest.mark.req("Q-16", "Q-5")
def test_no_admitted_request_is_stale_at_claim_where_the_claims_keep_coming() -> None:
    num_claimed = num_bounded = num_shuffled = 0

    for seed in range(250):
        simulation = a_simulation(seed)
        simulation.run(120)
        for rollout, stale_at_step in simulation.stale:
            claims_that_failed = [
                step for step in simulation.skipped_steps if rollout.arrival_step <= step < stale_at_step
            ]
            assert claims_that_failed, (seed, rollout, stale_at_step)
        num_claimed += simulation.num_claimed
        num_bounded += simulation.num_freshness_limited > 0
        num_shuffled += simulation.slowest_ticks > simulation.quickest_step_ticks

    assert num_claimed > 5_000  # the bound does not hold by asking for nothing
    assert num_bounded > 50  # it was the bound that held many runs, not the aim
    assert num_shuffled > 50  # rollouts overtook each other over steps


@pytest.mark.req("Q-16")
def test_the_ready_depth_stays_at_its_aim_when_producers_keep_up() -> None:
    num_runs = 0

    for seed in range(150):
        simulation = a_simulation(seed, version_window=40)
        settings = simulation.settings
        simulation.run(150)
        if simulation.num_freshness_limited:
            continue
        num_runs += 1
        num_warm_up = simulation.generation_steps
        depths = simulation.depths_at_claim[num_warm_up:]
        overshoot = settings.gradient_accumulation_steps * simulation.generation_steps
        chunk_packs = -(-settings.rollouts_per_request // simulation.segments_per_pack)
        assert min(depths) >= settings.prefetch_target_packs, seed
        assert max(depths) <= settings.prefetch_target_packs + overshoot + chunk_packs, seed
        assert not simulation.stale, seed

    assert num_runs > 100


@pytest.mark.req("Q-16")
def test_slow_producers_never_have_more_in_flight_than_the_aim_asks_for() -> None:
    for seed in range(40):
        simulation = a_simulation(seed, version_window=40)
        simulation.num_workers = 1
        settings = simulation.settings
        for _ in range(100):
            simulation.run(1)
            decision = decide_demand(simulation.state(), settings)
            level = settings.prefetch_target_packs + settings.gradient_accumulation_steps * (
                simulation.generation_steps
            )
            most = level * settings.world_size * simulation.segments_per_pack
            assert len(simulation.in_flight) <= most + settings.rollouts_per_request
            assert decision.num_rollouts <= most + settings.rollouts_per_request
