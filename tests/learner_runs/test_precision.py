"""L-2: in bfloat16 the weights move as far as in float32, and a checkpoint keeps every bit of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.checkpoints import latest_checkpoint
from learner.optimization import build_optimizer
from learner.sharding import Precision
from learner.trained_weights import TrainedWeights
from learner.weights import publish_weights
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import companions_of, one_rank, run_one, settings_for
from tests.builders.learners import tiny_model
from tests.builders.settings import optimization_settings

pytestmark = pytest.mark.timeout(400)  # several learners, on a machine that may be busy

torch.set_num_threads(1)
NUM_STEPS = 100


def movement(folder: Path, precision: Precision, learning_rate: float) -> float:
    """Return how far a run of 100 steps moves the weights (Euclidean), as its last checkpoint has them."""
    from safetensors.torch import load_file

    optimization = optimization_settings(learning_rate=learning_rate, max_steps=NUM_STEPS)
    name = f"{precision}-{learning_rate}"
    settings = settings_for(
        folder,
        name,
        precision=precision,
        optimization=optimization,
        max_steps=NUM_STEPS,
        b_ratio="0",
        save_every_steps=0,
        row_capacity_tokens=256,  # the step in one row
        is_policy_published=False,
    )
    run_one(one_rank(), settings, FakeBroker(1))
    checkpoint = latest_checkpoint(folder / name / "checkpoints")
    assert checkpoint is not None
    start, end = tiny_model(seed=3).state_dict(), load_file(checkpoint / "model.safetensors")
    moved = [(value.double() - start[key].double()).square().sum() for key, value in end.items()]
    return float(torch.stack(moved).sum().sqrt())


@pytest.mark.slow
@pytest.mark.req("L-2")
@pytest.mark.parametrize("learning_rate", [1e-6, 1e-5, 2e-5])
def test_weights_move_in_bfloat16_as_far_as_in_float32(tmp_path: Path, learning_rate: float) -> None:
    ratio = movement(tmp_path, "bf16", learning_rate) / movement(tmp_path, "float32", learning_rate)
    assert 0.98 <= ratio <= 1.02


@pytest.mark.req("L-2")
def test_weights_gradient_sums_and_moments_are_float32_and_the_model_computes_in_bfloat16() -> None:
    trained = TrainedWeights(tiny_model(), "bf16")
    optimizer = build_optimizer(trained.parameters.items(), optimization_settings())
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    for _ in range(2):
        trained.model(input_ids=torch.arange(1, 9)[None]).logits.float().sum().backward()
    assert {p.grad for p in trained.model.parameters()} == {None}
    found = {name for name, p in trained.parameters.items() if p.grad is not None}
    assert "model.language_model.embed_tokens.weight" in found
    optimizer.step()
    states = [state for state in optimizer.state.values() if state]
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


@pytest.mark.req("L-2")
def test_gradients_of_rows_add_up_without_rounding_to_bfloat16() -> None:
    trained = TrainedWeights(torch.nn.Linear(1, 1, bias=False), "bf16")
    for value in (1.0, 2.0**-12):
        trained.model(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert float(next(iter(trained.parameters.values())).grad.item()) == 1.0 + 2.0**-12


@pytest.mark.req("L-2", "Q-10")
def test_a_resumed_bfloat16_run_has_the_losses_and_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    whole = settings_for(tmp_path, "whole", precision="bf16")
    run_one(one_rank(), whole, FakeBroker(1))
    run_one(one_rank(), settings_for(tmp_path, "cut", precision="bf16", max_steps=4), FakeBroker(1))
    run_one(one_rank(), settings_for(tmp_path, "cut", precision="bf16"), FakeBroker(1))
    losses = [
        [row["loss"] for row in read_json_lines(tmp_path / name / "train_log.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    ends = [
        (tmp_path / name / "checkpoints" / "checkpoint-6" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert ends[0] == ends[1]


@pytest.mark.req("L-2")
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_weights_are_published_in_the_format_that_is_asked_for(tmp_path: Path, precision: Precision) -> None:
    import json

    from safetensors.torch import load_file

    (tmp_path / "companions").mkdir()
    trained = TrainedWeights(tiny_model(), precision)
    path = publish_weights(
        tmp_path / "policy",
        trained=trained,
        policy_version=0,
        companions=companions_of(tmp_path / "companions"),
        num_kept=2,
        dtype=torch.bfloat16,
    )
    assert {value.dtype for value in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
