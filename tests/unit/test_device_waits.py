"""Rows that follow each other without a look at the device in between [S-8]."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from broker_schemas.errors import NonFiniteLoss
from learner.collation import PackedRow, collate_row
from learner.losses import LossSettings
from learner.packed_forward import RowLoss, position_rule_of
from learner.train_step import LossSums, run_micro_steps
from tests.builders.learners import COLLATION, COORD_IDS, make_pixels, make_segment, tiny_model
from tests.builders.settings import loss_settings

torch.set_num_threads(1)
LOOKS = ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy")


def row_of(model: Any, name: str, **changes: Any) -> PackedRow:
    segment = make_segment(name, seed=sum(name.encode()), **changes)
    return collate_row([segment], [make_pixels(segment)], COLLATION, position_rule_of(model))


def steps_over(model: Any, rows: list[PackedRow], loss: LossSettings) -> LossSums:
    return run_micro_steps(
        RowLoss(model),
        rows,
        num_segments_in_step=len(rows),
        loss_settings=loss,
        device=torch.device("cpu"),
    )


@pytest.mark.req("S-8")
def test_the_learner_looks_at_the_device_once_a_step_however_many_rows_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, looks = tiny_model(seed=3), list[str]()
    rows = [row_of(model, name) for name in "abc"]
    for name in LOOKS:
        plain = getattr(torch.Tensor, name)

        def noted(self: torch.Tensor, *given: Any, plain: Any = plain, name: str = name, **named: Any) -> Any:
            if "/learner/" in sys._getframe(1).f_code.co_filename:  # what the model itself does is not ours
                looks.append(name)
            return plain(self, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    loss = loss_settings(coord_ids=COORD_IDS)

    one, three = steps_over(model, rows[:1], loss), steps_over(model, rows, loss)

    assert looks == ["tolist", "tolist"]
    assert (one.num_rows, three.num_rows) == (1, 3)
    assert three.total > one.total > 0


@pytest.mark.req("L-2")
def test_a_loss_that_is_no_number_is_named_after_the_rows_are_done() -> None:
    model = tiny_model(seed=3)
    with pytest.raises(NonFiniteLoss, match="loss of segment b"):
        steps_over(model, [row_of(model, "b")], loss_settings(coord_ids=COORD_IDS, temperature_coord=1e-42))
