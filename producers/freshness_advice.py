"""Says in words that no demand could serve the B steps fresh, with the setting to change. Pure."""

from __future__ import annotations

from typing import Final

from producers.claim_plan import ClaimRule, sufficient_window, unreachable_share

LEAST_SHARE: Final = 0.05
"""Below this share of B steps out of reach nothing is said: 95 % are to be served."""


def freshness_advice(rule: ClaimRule, generation_steps: int) -> str:
    """Return one sentence, empty where at least 95 % of the B steps can be served fresh.

    ``generation_steps`` is what most rollouts take from their request to the claim that they are ready for.
    """
    share = unreachable_share(rule, generation_steps)
    if share <= LEAST_SHARE:
        return ""
    enough = sufficient_window(rule, generation_steps)
    return (
        f"{share:.0%} of the B steps cannot be served fresh: a rollout is ready {generation_steps} optimizer "
        f"steps after it is asked for, and stage2_async.version_window {rule.version_window} with "
        f"sync_every_steps {rule.sync_every_steps} lets it grow too old; set stage2_async.version_window to "
        f"{enough}, or raise sync_every_steps, or add producers"
    )
