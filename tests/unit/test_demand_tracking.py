"""What the dispatcher measures, and that one slow measure does not silence it for ever."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_schemas.broker.status import RunStatus
from learner.schedule import is_rollout_step
from producers.demand import DemandSettings, claimable_packs, decide_demand
from producers.demand_tracking import DemandTracker

SETTINGS = DemandSettings(
    world_size=2,
    gradient_accumulation_steps=2,
    prefetch_target_packs=4,
    version_window=2,
    sync_every_steps=1,
    b_ratio=Fraction(1, 2),
    rollouts_per_request=8,
)


def a_status(*, requested: int = 0, open_records: int = 0, steps: int = 0, **changes: Any) -> RunStatus:
    fields: dict[str, Any] = {
        "policy_version": steps,
        "ready_depths": (0, 0),
        "ready_versions": ((), ()),
        "segments_waiting": 0,
        "matched_waiting": 0,
        "open_claims": 0,
        "counters": {
            "requested": requested,
            "open_records": open_records,
            "committed_steps": steps,
            "steps:A": steps,
        },
        "open_step": None,
    }
    return RunStatus(**{**fields, **changes})


@pytest.mark.req("Q-16")
def test_the_estimate_is_the_slowest_of_late_while_rollouts_are_under_way() -> None:
    tracker = DemandTracker(4.0, 1000)
    tracker.on_issued(8, 0)
    tracker.observe(a_status(requested=8, steps=19), SETTINGS)
    state = tracker.observe(a_status(requested=16, open_records=8, steps=20), SETTINGS)
    assert state.generation_steps == 20


@pytest.mark.req("Q-16")
def test_a_slow_start_does_not_end_all_requests() -> None:
    tracker = DemandTracker(4.0, 1000)
    tracker.on_issued(8, 0)
    state = tracker.observe(a_status(requested=8, steps=30), SETTINGS)
    assert state.generation_steps == 1
    assert decide_demand(state, SETTINGS).num_rollouts > 0


@pytest.mark.req("Q-16")
def test_one_straggler_that_cannot_be_fresh_does_not_stop_the_others() -> None:
    tracker = DemandTracker(4.0, 1000)
    for step in range(12):
        tracker.on_issued(8 * (step + 1), step)
        tracker.observe(a_status(requested=8 * (step + 1), steps=step), SETTINGS)
    tracker.on_issued(104, 12)
    tracker.observe(a_status(requested=104, open_records=8, steps=21), SETTINGS)
    tracker.observe(a_status(requested=104, steps=21), SETTINGS)
    tracker.on_issued(112, 21)

    state = tracker.observe(a_status(requested=112, open_records=8, steps=21), SETTINGS)

    assert tracker.slowest_generation_steps == 10
    assert state.generation_steps == 1
    assert decide_demand(state, SETTINGS).num_rollouts > 0


@pytest.mark.req("Q-16")
def test_what_is_outstanding_is_known_by_the_step_at_which_it_was_asked_for() -> None:
    tracker = DemandTracker(4.0, 1000)
    tracker.on_issued(8, 0)
    tracker.on_issued(16, 0)
    tracker.on_issued(24, 1)
    state = tracker.observe(a_status(requested=24, open_records=14, steps=1), SETTINGS)
    assert state.outstanding_by_step == ((0, 6), (1, 8))

    # a dispatcher that was started again finds what its forerunner asked for
    anew = DemandTracker(4.0, 1000)
    state = anew.observe(a_status(requested=24, open_records=14, steps=5), SETTINGS)
    assert state.outstanding_by_step == ((5, 14),)


def matched_status(matched: int, tokens: int, *, packed: int = 0, packed_segments: int = 0) -> RunStatus:
    counters = {
        "matched": matched,
        "matched_tokens": tokens,
        "packed": packed,
        "packed_segments": packed_segments,
    }
    return a_status(counters=counters)


@pytest.mark.req("Q-16")
def test_what_fills_a_pack_follows_from_lengths_and_small_packs_do_not_shrink_it() -> None:
    tracker = DemandTracker(4.0, 1000)
    assert tracker.observe(matched_status(0, 0), SETTINGS).segments_per_pack == 4.0

    # given eight rollouts of 100 tokens that left in packs of two, as where rollouts are few
    state = tracker.observe(matched_status(8, 800, packed=4, packed_segments=8), SETTINGS)
    assert (state.segments_per_pack, state.least_segments_per_pack) == (10.0, 2.0)

    # then longer ones count as many as they are
    state = tracker.observe(matched_status(16, 800 + 8 * 300, packed=6, packed_segments=16), SETTINGS)
    assert state.segments_per_pack == 5.0


@pytest.mark.req("Q-16")
def test_a_rollout_that_fills_a_pack_alone_counts_as_one() -> None:
    tracker = DemandTracker(4.0, 1000)
    assert tracker.observe(matched_status(1, 1000), SETTINGS).segments_per_pack == 1.0


@pytest.mark.req("Q-16")
def test_packs_that_are_stale_when_they_would_be_claimed_are_no_supply() -> None:
    settings = replace(SETTINGS, b_ratio=Fraction(1, 5), sync_every_steps=4)  # rollout steps 4, 9, 14, ...
    versions = ((1, 2, 3), (0, 3))

    # step 9 has version 2, step 14 version 3, step 19 version 4
    assert claimable_packs(versions, 5, settings) == (3, 2)
    assert claimable_packs(versions, 9, settings) == (3, 2)
    assert claimable_packs(versions, 10, settings) == (3, 1)
    assert claimable_packs(versions, 15, settings) == (2, 1)
    assert claimable_packs(((), ()), 15, settings) == (0, 0)


@pytest.mark.req("Q-16")
@given(
    next_claim_step=st.integers(0, 400),
    numerator=st.integers(1, 20),
    sync_every_steps=st.integers(1, 5),
    version_window=st.integers(0, 4),
)
def test_the_next_claim_is_that_of_the_schedule(
    next_claim_step: int, numerator: int, sync_every_steps: int, version_window: int
) -> None:
    ratio = Fraction(numerator, 20)
    settings = replace(
        SETTINGS, b_ratio=ratio, sync_every_steps=sync_every_steps, version_window=version_window
    )
    claim_step = next(step for step in count(next_claim_step) if is_rollout_step(step, ratio))
    oldest = max(0, claim_step // sync_every_steps - version_window)

    versions = tuple(range(oldest + 3))
    assert claimable_packs((versions,), next_claim_step, settings) == (3,)


@pytest.mark.req("Q-16")
def test_a_ready_pack_that_will_be_stale_is_asked_for_anew() -> None:
    settings = replace(SETTINGS, b_ratio=Fraction(1, 5), sync_every_steps=4, version_window=1)
    tracker = DemandTracker(4.0, 1000)
    # step 10 comes; the next rollout step is 14, of version 3
    old, fresh = ((1, 1, 1, 1),) * 2, ((2, 2, 2, 2),) * 2

    def wanted(ready_versions: tuple[tuple[int, ...], ...]) -> int:
        status = a_status(steps=10, ready_depths=(4, 4), ready_versions=ready_versions)
        return decide_demand(tracker.observe(status, settings), settings).num_rollouts

    assert wanted(fresh) == 0
    assert wanted(old) == 16  # two packs for each of two ranks, of four segments
