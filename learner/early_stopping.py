"""Whether a validation number ends the run; pure, and part of every checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from learner.checkpoints import TrainerState
from learner.settings import EarlyStopSettings

_LOWER_IS_BETTER: Final = ("fp", "fn", "dropped_", "parse_", "duplicate")


def is_lower_better(metric: str) -> bool:
    """Say whether less of a number is better: errors, duplicates, answers that do not parse."""
    return metric in _LOWER_IS_BETTER or metric.startswith(_LOWER_IS_BETTER[2:])


def note_evaluation(state: TrainerState, value: float, metric: str = "f1") -> TrainerState:
    """Return ``state`` after an evaluation with this ``value`` of the watched number.

    The state keeps it so that more is better: as it is, else 1 / (1 + value).
    """
    score = 1.0 / (1.0 + value) if is_lower_better(metric) else value
    if score > state.best_f1:
        return replace(state, best_f1=score, best_step=state.optimizer_step, evaluations_since_best=0)
    return replace(state, evaluations_since_best=state.evaluations_since_best + 1)


def stop_reason(state: TrainerState, value: float, settings: EarlyStopSettings) -> str | None:
    """Return why the run ends after an evaluation with this ``value``, None when it goes on."""
    metric, target = settings.metric, settings.target
    is_lower = is_lower_better(metric)
    if target is not None and (value <= target if is_lower else value >= target):
        return f"validation {metric} {value:.3f} reached its target {target:g}"
    if settings.patience is not None and state.evaluations_since_best >= settings.patience:
        best = 1.0 / state.best_f1 - 1.0 if is_lower else state.best_f1
        return f"no better validation {metric} than {best:.3f} in {settings.patience} evaluations"
    return None
