"""The values a report shows, free of files and of how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rollstream.show.drawing import Shape

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class KeyNumbers:
    """The numbers at the head of a report.

    Shares lie in 0..1; ``None`` means that nothing in the run folder says it. ``skips`` counts A steps that
    were due to be B, by reason. Rates leave out pauses in what was written.
    """

    num_steps: int = 0
    num_b_steps: int = 0
    num_scheduled_b_steps: int | None = None
    scheduled_b_ratio: str | None = None
    skips: Mapping[str, int] = field(default_factory=dict)
    rollouts_requested: int | None = None
    rollouts_pushed: int | None = None
    rollouts_trained: int | None = None
    rollouts_in_flight: int | None = None
    duplicates: int | None = None
    drops: Mapping[str, int] = field(default_factory=dict)
    rejects: Mapping[str, int] = field(default_factory=dict)
    object_drops: Mapping[str, int] = field(default_factory=dict)
    idle_share: float | None = None
    rollouts_per_s: float | None = None
    tokens_per_s: float | None = None
    steps_per_s: float | None = None
    mean_fill: float | None = None
    last_policy_version: int | None = None
    peak_broker_bytes: int | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    demand_advice: str = ""
    duration_s: float | None = None

    @property
    def realised_b_ratio(self) -> float | None:
        return self.num_b_steps / self.num_steps if self.num_steps else None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One validation image with what was labelled and what one evaluation's rollout wrote."""

    sample_id: str
    image_paths: tuple[str, ...]
    ground_truth: tuple[Shape, ...]
    predictions: tuple[Shape, ...]
    num_undrawable: int
    rollout_text: str
    is_invalid: bool
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: metrics without their ``eval_rollout_`` prefix, examples by sample id.

    ``gate`` is the IoU at which the run matches; ``classes`` holds the numbers of each labelled class.
    """

    label: str
    optimizer_step: int | None
    metrics: Mapping[str, float]
    examples: Mapping[str, Example]
    gate: float | None = None
    classes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SumLine:
    """One line of the audit: ``depth`` 0 for a sum, 1 for a part of the sum above."""

    name: str
    value: str
    depth: int = 0
    verdict: Literal["good", "bad", ""] = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything one report shows; ``missing`` says in words what the run folder did not hold.

    ``audit_note``: of when the audit is, and whether the run went on since; empty without one.
    """

    run_name: str
    variant: str
    model: str
    started_at_ms: int | None
    numbers: KeyNumbers
    queue_limit: int | None
    steps: tuple[Row, ...]
    samples: tuple[Row, ...]
    evaluations: tuple[Evaluation, ...]
    audit: tuple[SumLine, ...]
    audit_note: str = ""
    missing: tuple[str, ...]

    @property
    def before_and_after(self) -> tuple[Evaluation, ...]:
        """Return the evaluations to compare: the first and the last, one, or none."""
        return self.evaluations if len(self.evaluations) < 2 else (self.evaluations[0], self.evaluations[-1])
