"""L-5: parts that are frozen do not move, and parts have learning rates of their own on one course."""

from __future__ import annotations

import pytest
import torch

from broker_schemas.errors import ConfigError
from learner.model_parts import freeze_parts, part_of
from learner.optimization import OptimizationSettings, build_optimizer, set_learning_rate
from learner.trained_weights import TrainedWeights
from tests.builders.learners import tiny_model
from tests.builders.settings import optimization_settings

torch.set_num_threads(1)


def moved_parts(optimization: OptimizationSettings, *, frozen: tuple[str, ...] = ()) -> dict[str, float]:
    """Return the largest movement of each part in one step of equal gradients."""
    model = tiny_model()
    freeze_parts(model, frozen)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(TrainedWeights(model).parameters.items(), optimization)
    set_learning_rate(optimizer, optimization.learning_rate / 2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        largest = float((parameter.detach() - before[name]).abs().max())
        moved[part_of(name)] = max(moved.get(part_of(name), 0.0), largest)
    return moved


@pytest.mark.req("L-5")
def test_each_part_has_its_learning_rate_on_the_course_of_all() -> None:
    rates = {"vision": 4e-3, "merger": 2e-3}
    moved = moved_parts(optimization_settings(learning_rate=1e-3, part_rates=rates))  # type: ignore[arg-type]
    assert moved == {
        "vision": pytest.approx(2e-3, rel=1e-3),
        "merger": pytest.approx(1e-3, rel=1e-3),
        "text": pytest.approx(5e-4, rel=1e-3),
    }


@pytest.mark.req("L-5")
def test_frozen_parts_stay_and_have_no_gradient() -> None:
    moved = moved_parts(optimization_settings(learning_rate=1e-3), frozen=("vision", "text"))
    assert moved["vision"] == moved["text"] == 0
    assert moved["merger"] > 0


@pytest.mark.req("L-5")
def test_a_part_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="got vision, of which this model has no weights"):
        freeze_parts(torch.nn.Linear(2, 2), ["vision"])
