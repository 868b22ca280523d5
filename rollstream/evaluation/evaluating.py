"""`rollstream eval`: finds the model, evaluates it, shows progress and keeps the result."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from broker_schemas.method.model_folder import NEEDED_FILES
from configs import RunConfig
from learner.checkpoints import latest_checkpoint
from rollstream.evaluation.evaluation import Evaluation, Evaluator, write_evaluation
from rollstream.wiring import access


def evaluate_run(
    config: RunConfig, *, model: Path | None, label: str | None, num_samples: int | None
) -> Evaluation:
    """Return the evaluation of ``model``: a folder, else the latest checkpoint, else the start model."""
    import torch

    torch.set_num_threads(max(1, config.training.num_threads))
    folder = access.run_folder(config)
    checkpoint = latest_checkpoint(folder.checkpoints_dir)
    chosen = model or checkpoint or access.model_dir(config)
    # a model that was made elsewhere is asked with its own tokenizer
    own = model if model and all((model / name).is_file() for name in NEEDED_FILES) else None
    evaluator = Evaluator(config, num_samples=num_samples, companions=own)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(f"evaluating {chosen}"), total=None)
        evaluation = evaluator.evaluate_folder(
            chosen, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    if label is not None:
        jsonl = config.data.val_jsonl or ""
        write_evaluation(
            folder.evaluation(label),
            evaluation,
            label=label,
            optimizer_step=steps_of(chosen),
            root=access.data_root(config, jsonl),
        )
    return evaluation


def evaluate(
    config: RunConfig, *, model: str | Path | None = None, num_samples: int | None = None
) -> dict[str, float]:
    """Return the metrics of a model on the validation set of a loaded configuration: a library door.

    ``model`` is a folder, by default the run's latest checkpoint, else its start model; ``num_samples``
    images, the first ones, by default all. Keys are those of ROLLOUT_MATCHING section 10. Nothing is written.
    """
    chosen = Path(model) if model is not None else None
    return evaluate_run(config, model=chosen, label=None, num_samples=num_samples).metrics


def label_of(config: RunConfig, model: Path | None) -> str:
    """Return the name that an evaluation gets where none is given: the checkpoint's, or ``start``."""
    checkpoint = latest_checkpoint(access.run_folder(config).checkpoints_dir)
    chosen = model or checkpoint
    if chosen is None:
        return "start"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", chosen.resolve().name) or "model"


def steps_of(folder: Path) -> int:
    """Return the optimizer steps that a checkpoint folder names, 0 for a start model."""
    name, _, number = folder.name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else 0
