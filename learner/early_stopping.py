"""Whether a validation F1 ends the run; pure, and part of every checkpoint."""

from __future__ import annotations

from dataclasses import replace

from learner.checkpoints import TrainerState
from learner.settings import EarlyStopSettings


def note_evaluation(state: TrainerState, f1: float) -> TrainerState:
    """Return ``state`` after an evaluation with this F1."""
    if f1 > state.best_f1:
        return replace(state, best_f1=f1, evaluations_since_best=0)
    return replace(state, evaluations_since_best=state.evaluations_since_best + 1)


def stop_reason(state: TrainerState, f1: float, settings: EarlyStopSettings) -> str | None:
    """Return why the run ends after an evaluation with this F1, None when it goes on."""
    if settings.target_f1 is not None and f1 >= settings.target_f1:
        return f"validation F1 {f1:.3f} reached its target {settings.target_f1:g}"
    if settings.patience is not None and state.evaluations_since_best >= settings.patience:
        return f"no better validation F1 than {state.best_f1:.3f} in {settings.patience} evaluations"
    return None
