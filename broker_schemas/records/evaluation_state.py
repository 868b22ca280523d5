"""Rounds of evaluation as values: how far one is asked for and answered, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

ROUND_SPAN: Final = 10_000_000
"""Most samples of a round: a position is its policy version times this, plus the samples asked for."""


@dataclass(frozen=True, kw_only=True)
class EvaluationState:
    """Where evaluation stands. ``policy_version`` is that of the latest round, 0 before the first.

    ``num_asked`` samples of it were asked for; ``num_outstanding`` of those have no answer. ``settled`` is
    the policy version of the last round whose numbers are there.
    """

    policy_version: int = 0
    num_asked: int = 0
    num_outstanding: int = 0
    settled: int = 0

    @property
    def cursor(self) -> int:
        return self.policy_version * ROUND_SPAN + self.num_asked

    def is_answered(self, num_samples: int) -> bool:
        """Whether all of the latest round was asked for, and nothing of it is under way."""
        return self.policy_version > 0 and self.num_asked >= num_samples and not self.num_outstanding


@dataclass(frozen=True, kw_only=True)
class EvaluationNumbers:
    """What a round gave: metrics by the keys of ROLLOUT_MATCHING section 10.

    ``policy_version`` is the one that was asked, ``highest_policy_version`` the latest that answered;
    ``optimizer_step`` counts the steps done when the former was published.
    """

    optimizer_step: int
    policy_version: int
    highest_policy_version: int
    metrics: dict[str, float]

    def to_body(self) -> dict[str, Any]:
        return {
            "optimizer_step": self.optimizer_step,
            "policy_version": self.policy_version,
            "highest_policy_version": self.highest_policy_version,
            "metrics": self.metrics,
        }
