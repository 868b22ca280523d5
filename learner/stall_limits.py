"""How one deadline is shared out between those who wait, so that whoever knows the reason speaks first.

A call to the broker ends before its caller's patience with the broker, that before rank 0's patience with the
queue, and that before the other ranks' patience with rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# torchrun kills a rank 30 s after it asked it to end
STOPPING_LIMIT_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """The parts of ``total_s``, the run's `stage2_async.stall_timeout_s`; all in seconds."""

    total_s: float

    @property
    def one_call_s(self) -> float:
        """For one try of one call to the broker."""
        return max(0.5, 0.05 * self.total_s)

    @property
    def broker_away_s(self) -> float:
        """For a broker that does not answer, tries together."""
        return 0.8 * self.total_s

    @property
    def decision_s(self) -> float:
        """For rank 0 to get a decision out of the queue."""
        return 0.9 * self.total_s

    @property
    def broker_away_while_stopping_s(self) -> float:
        """For a broker that does not answer a run that was asked to stop."""
        return min(self.broker_away_s, STOPPING_LIMIT_S)
