"""Demand of the on-policy variants: exactly the rollouts of the step that is open. Pure."""

from __future__ import annotations

from broker_schemas.broker.status import RunStatus


def rollouts_for_open_step(status: RunStatus) -> int:
    """Return how many rollouts the open step still lacks; 0 when none is open or its packs are complete.

    What was rejected or dropped is asked for again: a step learns its full number of rollouts.
    """
    step = status.open_step
    if step is None or step.sealed:
        return 0
    matched_for_step = status.matched_waiting - step.carried + step.packed_segments
    return max(0, step.num_rollouts - matched_for_step - status.outstanding)
