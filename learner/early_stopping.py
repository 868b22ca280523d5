"""Whether a validation number ends the run; pure, and part of every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from broker_schemas.errors import RunStopped
from broker_schemas.method.evaluation_numbers import DROPPED, NUMBERS, PREFIX
from learner.checkpoints import TrainerState
from learner.settings import EarlyStopSettings


def is_lower_better(metric: str) -> bool:
    """Say whether less of a number is better: errors, duplicates, answers that do not parse."""
    return metric in NUMBERS and NUMBERS[metric].is_lower_better


def watched_value(results: Mapping[str, float], metric: str) -> float:
    """Return the watched number of an evaluation; a reason for which nothing was dropped has 0.

    Raises RunStopped where this evaluation has no such number.
    """
    value = results.get(f"{PREFIX}{metric}", 0.0 if metric.startswith(DROPPED) else None)
    if value is not None:
        return value
    known = ", ".join(sorted(name.removeprefix(PREFIX) for name in results))
    raise RunStopped(
        f"training.early_stop.metric: got {metric!r}, which this evaluation does not have (AP needs "
        f"log-probabilities of every object, AP of a size labelled objects of that size); it has {known}"
    )


def note_evaluation(
    state: TrainerState, value: float, metric: str = "f1", *, at_step: int | None = None
) -> TrainerState:
    """Return ``state`` after an evaluation with this ``value`` of the watched number.

    ``at_step``: the steps done by what was evaluated, where that is not the state.

    The state keeps it so that more is better: as it is, else 1 / (1 + value).
    """
    score = 1.0 / (1.0 + value) if is_lower_better(metric) else value
    if score > state.best_f1:
        best_step = state.optimizer_step if at_step is None else at_step
        return replace(state, best_f1=score, best_step=best_step, evaluations_since_best=0)
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
