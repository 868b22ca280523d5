"""What the training log says around a step: the queue as it stands, and how often B steps happened lately.

Pure: it is handed what the broker answered [O-3].
"""

from __future__ import annotations

from typing import Final, Literal

from broker_schemas.records.reasons import DROP_REASONS, SKIP_REASONS
from broker_schemas.records.run_status import RunStatus
from learner.step_report import LogRow

REALISED_RATIO_STEPS: Final = 50


def realised_ratio(recent_kinds: str) -> LogRow:
    """Return the share of B among the kinds of the last steps, one letter each; 0 for none."""
    return {"b_step_ratio": recent_kinds.count("B") / max(len(recent_kinds), 1)}


def queue_columns(status: RunStatus | None, kind: Literal["A", "B"]) -> LogRow:
    """Return the queue's columns of a step: packs ready for each rank when it was committed, and the run's
    sums of drops and skips by reason; none without a queue.

    ``packing/post_rollout_buffer``: matched segments in no pack yet; like all of P-11 on B steps only.
    """
    if status is None:
        return {}
    columns: LogRow = {f"queue/depth_{rank}": depth for rank, depth in enumerate(status.ready_depths)}
    dropped = status.by_reason("dropped")
    columns |= {f"queue/dropped_{reason}": dropped.get(reason, 0) for reason in DROP_REASONS}
    columns |= {f"queue/skipped_{reason}": status.total(f"claims:{reason}") for reason in SKIP_REASONS}
    if kind == "B":
        columns["packing/post_rollout_buffer"] = status.matched_waiting
    return columns
