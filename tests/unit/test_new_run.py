"""`rollstream new` writes configurations whose values come from data and model, and nothing of a demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from configs import load_config
from rollstream.commands.new_run import plan_run, write_run
from rollstream.commands.program import app
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.wiring.trainable import find_untrainable
from tests.builders.datasets import write_jsonl, write_picture

BOX = {"desc": "RBC", "bbox_2d": [10, 20, 300, 400]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, num in (("train", 30), ("val", 5)):
        lines = []
        for number in range(num):
            write_picture(tmp_path / "data" / f"{split}{number}.png")
            lines.append(
                {
                    "images": [f"{split}{number}.png"],
                    "width": 64,
                    "height": 48,
                    "objects": [BOX] * (number + 1),
                }
            )
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", lines)
    return tmp_path / "data"


@pytest.mark.req("U-1")
def test_both_configurations_load_and_hold_every_sample(data: Path, tmp_path: Path) -> None:
    run = plan_run("mine", data, SHIPPED_MODEL, num_gpus=0, is_warm=False)
    warm, main = (load_config(path) for path in write_run(run, tmp_path / "made"))

    assert (warm.b_ratio, main.variant, warm.run.name) == (0, "stage2_async", "mine-warm")
    assert main.model.name_or_path == f"runs/mine-warm/checkpoints/checkpoint-{warm.training.max_steps}"
    assert find_untrainable(warm) == {}
    assert warm.rollout_matching.max_new_tokens >= run.measure.longest_payload
    assert main.training.global_max_length >= run.measure.longest.total
    # a demo's target would end it at the first evaluation that reaches it
    assert warm.training.early_stop.target is None
    assert all("extends" not in path.read_text() for path in (tmp_path / "made").iterdir())


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 3, 8])
def test_every_number_of_gpus_gives_a_configuration_that_loads(
    data: Path, tmp_path: Path, num_gpus: int
) -> None:
    run = plan_run("mine", data, SHIPPED_MODEL, num_gpus=num_gpus, is_warm=False)

    warm, main = (load_config(path) for path in write_run(run, tmp_path / "made"))

    assert (
        len(warm.devices.learner_gpus)
        == len(main.devices.learner_gpus)
        == (run.world_size if num_gpus else 0)
    )
    assert len(main.devices.rollout_gpus) == num_gpus // 2


@pytest.mark.req("U-1", "U-2")
def test_the_command_says_what_it_measured_and_wrote_and_what_is_next(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["new", "mine", "--data", str(data), "--model", str(SHIPPED_MODEL), "--gpus", "0"]

    done = CliRunner().invoke(app, words)
    again = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.output
    for text in (
        "35 images",
        "million parameters",
        "wrote mine-warm.yaml",
        "rollstream learn mine-warm.yaml",
    ):
        assert text in done.output
    assert isinstance(again.exception, DataError)
    assert "is there already" in str(again.exception)


@pytest.mark.req("U-1", "L-14")
def test_adapters_are_offered_and_merged_between_the_warm_start_and_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["new", "mine", "--data", str(data), "--model", str(SHIPPED_MODEL), "--gpus", "0", "--lora"]

    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.output
    assert "&& rollstream model export runs/mine-warm models/mine-warm && rollstream up" in done.output
    warm, main = (load_config(tmp_path / name) for name in ("mine-warm.yaml", "mine.yaml"))
    assert warm.training.lora.rank == main.training.lora.rank == 16
    assert main.model.name_or_path == "models/mine-warm"


def test_a_shape_that_no_processor_takes_is_left_out_by_the_configuration(data: Path, tmp_path: Path) -> None:
    write_picture(data / "flat.png", 3000, 10)
    flat: dict[str, Any] = {"images": ["flat.png"], "width": 3000, "height": 10, "objects": [BOX]}
    with (data / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(flat) + "\n")

    run = plan_run("mine", data, SHIPPED_MODEL, num_gpus=0, is_warm=True)
    (main,) = (load_config(path) for path in write_run(run, tmp_path / "made"))

    assert main.data.skip_untrainable
    assert main.model.name_or_path == str(SHIPPED_MODEL)


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl: no such file, expected a folder that 'rollstream data import'"
    ):
        plan_run("mine", tmp_path, SHIPPED_MODEL, num_gpus=0, is_warm=False)
    with pytest.raises(DataError, match="nothing"):
        plan_run("mine", data, tmp_path / "nothing", num_gpus=0, is_warm=False)
