"""Turns the end of a warm start into the small checkpoint that the repository ships [`make assets`].

``python -m rollstream.models.shipped_checkpoint CONFIG DST COMMAND...``: weights in bfloat16, tokenizer,
processor, and beside them ``trained.json``, which says how the checkpoint was made and how good it is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from broker_schemas.errors import DataError
from broker_schemas.method.evaluation_numbers import PREFIX
from broker_schemas.method.model_folder import load_policy
from configs import RunConfig, load_config
from learner.checkpoints import latest_checkpoint, save_model_folder
from rollstream.evaluation.evaluating import evaluate_run, steps_of
from rollstream.run_folder import Row, latest_steps, read_json_lines
from rollstream.staged_folder import staged_folder
from rollstream.wiring import access

MAKER: Final = "shipped-checkpoint"
LARGEST_BYTES: Final = 12_000_000
RECORD_FILE: Final = "trained.json"
SCORES: Final = tuple(
    f"{PREFIX}{name}"
    for name in ("f1", "f1_50", "f1_class_50", "label_accuracy", "precision", "recall", "map_50", "map")
)


def ship_checkpoint(
    config: RunConfig,
    destination: Path,
    *,
    commands: Sequence[str],
    replaced: Mapping[str, float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Write the latest checkpoint of ``config``'s run to ``destination``, evaluate it and return its record.

    The record says what the shipped weights reach, after rounding to bfloat16, and beside it what those that
    they replace reach, ``replaced``. ``note``: what the commands do not say about these weights.
    Raises DataError without a checkpoint, above LARGEST_BYTES, or over a folder that is not ours.
    """
    folder = access.run_folder(config)
    checkpoint = latest_checkpoint(folder.checkpoints_dir)
    if checkpoint is None:
        raise DataError(
            f"{folder.checkpoints_dir}: no checkpoint; run 'rollstream learn' with this file first"
        )
    steps = steps_of(checkpoint)
    with staged_folder(destination, MAKER, {"run": config.run.name, "optimizer_steps": steps}) as staging:
        save_model_folder(load_policy(checkpoint, "bfloat16"), staging, access.companions(config))
        size = sum(path.stat().st_size for path in staging.iterdir())
        if size > LARGEST_BYTES:
            raise DataError(f"{checkpoint}: got {size} bytes to ship, expected at most {LARGEST_BYTES}")
        metrics = evaluate_run(config, model=staging, label=None, num_samples=None).metrics
        rows = latest_steps(read_json_lines(folder.train_log))
        record = training_record(config, rows[:steps], metrics, commands=commands)
        if replaced is not None:
            record["scores_of_the_replaced"] = shown_scores(replaced)
        if note:
            record["note"] = note
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def training_record(
    config: RunConfig, rows: Sequence[Row], metrics: dict[str, float], *, commands: Sequence[str]
) -> dict[str, Any]:
    """Return how a checkpoint was made: commands, seed, steps, time spent in steps, and its scores."""
    return {
        "commands": list(commands),
        "seed": config.run.seed,
        "optimizer_steps": len(rows),
        "training_s": round(sum(float(row["step_s"]) for row in rows), 1),
        "validation_set": config.data.val_jsonl,
        "scores": shown_scores(metrics),
    }


def shown_scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the SCORES of an evaluation, rounded."""
    return {name: round(float(metrics[name]), 4) for name in SCORES}


def scores_of(config_path: Path, folder: Path) -> Mapping[str, float] | None:
    """Return what the checkpoint in ``folder`` reaches on the validation set; None without a checkpoint.

    It is judged with its own tokenizer.
    """
    if not (folder / "config.json").exists():
        return None
    config = load_config(config_path, (f"model.name_or_path={folder}",))
    return evaluate_run(config, model=folder, label=None, num_samples=None).metrics


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="shipped_checkpoint")
    parser.add_argument("config", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--note", default="")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        record = ship_checkpoint(
            load_config(given.config),
            given.destination,
            commands=given.commands,
            replaced=scores_of(given.config, given.destination),
            note=given.note,
        )
    except DataError as exc:
        Console(stderr=True, soft_wrap=True).print(f"shipped checkpoint: {exc}", markup=False)
        return 2
    console.print(f"{shlex.quote(str(given.destination))}: {json.dumps(record['scores'])}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
