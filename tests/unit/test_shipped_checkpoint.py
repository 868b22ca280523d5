"""The shipped checkpoint: small, loadable, with an honest record beside it, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.model_folder import load_policy
from learner.checkpoints import save_model_folder
from rollstream.models import shipped_checkpoint
from rollstream.models.shipped_checkpoint import LARGEST_BYTES, RECORD_FILE, ship_checkpoint
from tests.builders.learner_runs import companions_of

METRICS = {
    "eval_rollout_f1": 0.61234,
    "eval_rollout_f1_50": 0.5,
    "eval_rollout_f1_class_50": 0.25,
    "eval_rollout_label_accuracy": 0.5,
    "eval_rollout_map_50": 0.6,
    "eval_rollout_precision": 0.7,
    "eval_rollout_recall": 0.55,
    "eval_rollout_map": 0.4,
    "eval_rollout_matched": 12.0,
}


def a_warm_start(tmp_path: Path, tiny_folder: Path, *, with_checkpoint: bool = True) -> Any:
    """A run of three logged steps, with a checkpoint that covers two of them."""
    run = tmp_path / "runs" / "warm"
    run.mkdir(parents=True)
    lines = [json.dumps({"optimizer_step": step, "step_s": 1.25}) for step in range(3)]
    (run / "train_log.jsonl").write_text("\n".join(lines) + "\n")
    if with_checkpoint:
        checkpoint = run / "checkpoints" / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        save_model_folder(load_policy(tiny_folder, "float32"), checkpoint, companions_of(tiny_folder))
        (checkpoint / "trainer_state.json").write_text("{}")
    return SimpleNamespace(
        run=SimpleNamespace(name="warm", output_dir=str(tmp_path / "runs"), seed=17),
        model=SimpleNamespace(
            name_or_path=str(tiny_folder), image=SimpleNamespace(min_pixels=None, max_pixels=None)
        ),
        data=SimpleNamespace(val_jsonl="data/scenes/val.jsonl"),
    )


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Evaluation is another test's matter: note which folder was to be evaluated."""
    seen: list[Path] = []

    def evaluate(_config: Any, *, model: Path, **_: Any) -> Any:
        seen.append(model)
        assert (model / "model.safetensors").exists()
        return SimpleNamespace(metrics=METRICS)

    monkeypatch.setattr(shipped_checkpoint, "evaluate_run", evaluate)
    return seen


def test_it_is_small_loadable_and_says_how_it_was_made(
    tmp_path: Path, tiny_folder: Path, evaluated: list[Path]
) -> None:
    destination = tmp_path / "shipped"

    ship_checkpoint(a_warm_start(tmp_path, tiny_folder), destination, commands=["rollstream learn x.yaml"])

    assert sum(path.stat().st_size for path in destination.iterdir()) < LARGEST_BYTES
    assert {path.suffix for path in destination.iterdir()} <= {".json", ".jinja", ".safetensors"}
    assert not list(destination.glob("optimizer*"))
    assert load_policy(destination, "float32").dtype.is_floating_point
    assert len(evaluated) == 1
    assert json.loads((destination / RECORD_FILE).read_text()) == {
        "commands": ["rollstream learn x.yaml"],
        "seed": 17,
        "optimizer_steps": 2,
        "training_s": 2.5,
        "validation_set": "data/scenes/val.jsonl",
        "scores": {
            "eval_rollout_f1": 0.6123,
            "eval_rollout_f1_50": 0.5,
            "eval_rollout_f1_class_50": 0.25,
            "eval_rollout_label_accuracy": 0.5,
            "eval_rollout_map_50": 0.6,
            "eval_rollout_precision": 0.7,
            "eval_rollout_recall": 0.55,
            "eval_rollout_map": 0.4,
        },
    }


def test_the_record_shows_what_is_replaced_and_what_the_commands_do_not_say(
    tmp_path: Path, tiny_folder: Path, evaluated: list[Path]
) -> None:
    config, destination = a_warm_start(tmp_path, tiny_folder), tmp_path / "shipped"
    before = {**METRICS, "eval_rollout_f1": 0.41}

    ship_checkpoint(config, destination, commands=[], replaced=before, note="carried over")

    record = json.loads((destination / RECORD_FILE).read_text())
    assert record["scores_of_the_replaced"]["eval_rollout_f1"] == 0.41
    assert record["scores_of_the_replaced"].keys() == record["scores"].keys()
    assert record["note"] == "carried over"


def test_without_a_checkpoint_it_says_what_to_run(tmp_path: Path, tiny_folder: Path) -> None:
    config = a_warm_start(tmp_path, tiny_folder, with_checkpoint=False)

    with pytest.raises(DataError, match="no checkpoint; run 'rollstream learn'"):
        ship_checkpoint(config, tmp_path / "shipped", commands=[])


def test_too_large_a_checkpoint_is_refused_and_nothing_is_left(
    tmp_path: Path, tiny_folder: Path, evaluated: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_checkpoint, "LARGEST_BYTES", 1_000)

    with pytest.raises(DataError, match="expected at most 1000"):
        ship_checkpoint(a_warm_start(tmp_path, tiny_folder), tmp_path / "shipped", commands=[])

    assert not (tmp_path / "shipped").exists()
    assert not evaluated
