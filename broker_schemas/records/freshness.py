"""The one rule of freshness. Scripts receive its number; they do not know the rule."""

from __future__ import annotations


def oldest_allowed(current: int, window: int) -> int:
    """Return the lowest policy version that may still be trained on.

    A segment is fresh iff ``policy_version >= current - window`` [Q-5].
    ``current`` and ``window`` are policy versions (>= 0); the result is never below 0.
    """
    if current < 0 or window < 0:
        raise ValueError(f"freshness: got current {current}, window {window}, expected both >= 0")
    return max(0, current - window)
