"""What the dispatcher measures, and that one slow measure does not silence it for ever."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from broker_schemas.status import RunStatus
from producers.demand import DemandSettings, decide_demand
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
    tracker.observe(a_status(requested=8, steps=19))
    assert tracker.observe(a_status(requested=16, open_records=8, steps=20)).generation_steps == 20


@pytest.mark.req("Q-16")
def test_a_slow_start_does_not_end_all_requests() -> None:
    tracker = DemandTracker(4.0, 1000)
    tracker.on_issued(8, 0)
    state = tracker.observe(a_status(requested=8, steps=30))
    assert state.generation_steps == 1
    assert decide_demand(state, SETTINGS).num_rollouts > 0


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
    assert tracker.observe(matched_status(0, 0)).segments_per_pack == 4.0

    # given eight rollouts of 100 tokens that left in packs of two, as where rollouts are few
    state = tracker.observe(matched_status(8, 800, packed=4, packed_segments=8))
    assert (state.segments_per_pack, state.least_segments_per_pack) == (10.0, 2.0)

    # then longer ones count as many as they are
    state = tracker.observe(matched_status(16, 800 + 8 * 300, packed=6, packed_segments=16))
    assert state.segments_per_pack == 5.0


@pytest.mark.req("Q-16")
def test_a_rollout_that_fills_a_pack_alone_counts_as_one() -> None:
    tracker = DemandTracker(4.0, 1000)
    assert tracker.observe(matched_status(1, 1000)).segments_per_pack == 1.0
