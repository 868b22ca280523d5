"""Segments that cannot be trained leave their step, which is then what a run without them trains [Q-13]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from broker_schemas.errors import DataError, NonFiniteLoss, RunStopped
from broker_schemas.records.packs import StepClaim
from broker_schemas.records.records import ImageReference
from learner.collation import SegmentPixels
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker, FakePixels
from tests.builders.learner_runs import one_rank, run_one, settings_for, untimed
from tests.builders.learners import COORD_IDS
from tests.builders.settings import loss_settings

torch.set_num_threads(1)
PixelRule = Callable[[str, SegmentPixels | None], SegmentPixels | None]


class ChangedPixels(FakePixels):
    """Pixels that ``rule`` changes, by record id."""

    def __init__(self, rule: PixelRule) -> None:
        self._rule = rule

    def load_pixels(self, images: Sequence[ImageReference]) -> SegmentPixels | None:
        return self._rule(images[0].path.removesuffix(".png"), super().load_pixels(images))


class WithoutSome(FakeBroker):
    """Claims that never held some segments."""

    def __init__(self, *gone: str) -> None:
        super().__init__(1)
        self._gone = gone

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        claim = super().claim_step(
            optimizer_step=optimizer_step, scheduled_kind=scheduled_kind, policy_version=policy_version
        )
        return claim and claim.without(self._gone)


def gone(*names: str) -> ChangedPixels:
    def rule(name: str, pixels: SegmentPixels | None) -> SegmentPixels | None:
        if name in names:
            raise DataError(f"image {name}.png: does not exist; check the path in the data set")
        return pixels

    return ChangedPixels(rule)


def infinite(*names: str) -> ChangedPixels:
    def rule(name: str, pixels: SegmentPixels | None) -> SegmentPixels | None:
        if pixels is None or name not in names:
            return pixels
        return replace(pixels, patches=torch.full_like(pixels.patches, torch.inf))

    return ChangedPixels(rule)


def log_and_weights(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = read_json_lines(folder / name / "train_log.jsonl")
    weights = load_file(folder / name / "checkpoints" / "checkpoint-2" / "model.safetensors")
    return [untimed(row) for row in rows], dict(weights)


@pytest.mark.req("Q-13", "Q-10")
@pytest.mark.parametrize("lost", [("s0-p1-r2",), ("s0-p0-r0", "s0-p0-r1", "s0-p0-r2", "s0-p1-r0")])
def test_a_step_that_lost_segments_is_to_the_bit_the_step_without_them(
    tmp_path: Path, lost: tuple[str, ...]
) -> None:
    broker = FakeBroker(1)
    run_one(one_rank(), settings_for(tmp_path, "run", b_ratio="1", max_steps=2), broker, pixels=gone(*lost))
    settings = settings_for(tmp_path, "never", b_ratio="1", max_steps=2)
    run_one(one_rank(), settings, WithoutSome(*lost))

    assert [(item.record_id, item.reason) for item in broker.quarantined] == [
        (name, "quarantined_image") for name in lost
    ]
    assert "does not exist" in broker.quarantined[0].detail
    (rows, weights), (expected_rows, expected) = (log_and_weights(tmp_path, n) for n in ("run", "never"))
    assert rows == expected_rows
    assert [row["num_segments"] for row in rows] == [6 - len(lost), 6]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.req("Q-13")
def test_a_step_of_which_nothing_is_left_ends_the_run_with_what_to_look_at(tmp_path: Path) -> None:
    names = [f"s0-p{pack}-r{number}" for pack in range(2) for number in range(3)]
    broker = FakeBroker(1)
    with pytest.raises(RunStopped, match="none of the step can be trained: image s0-p0-r0.png: does not"):
        run_one(one_rank(), settings_for(tmp_path, "run", b_ratio="1"), broker, pixels=gone(*names))
    assert broker.quarantined == []


@pytest.mark.req("Q-13")
def test_a_loss_that_is_no_number_leaves_its_step_where_so_configured(tmp_path: Path) -> None:
    broker = FakeBroker(1)
    loss = loss_settings(coord_ids=COORD_IDS, keeps_non_finite=True)
    settings = settings_for(tmp_path, "run", b_ratio="1", max_steps=2, loss=loss)
    run_one(one_rank(), settings, broker, pixels=infinite("s0-p1-r1"), is_cut_by_segment=True)
    rows, weights = log_and_weights(tmp_path, "run")
    assert [(item.record_id, item.reason) for item in broker.quarantined] == [
        ("s0-p1-r1", "quarantined_loss")
    ]
    assert [row["num_segments"] for row in rows] == [5, 6]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


@pytest.mark.req("Q-13")
def test_weights_that_are_no_numbers_are_no_segments_fault(tmp_path: Path) -> None:
    # a temperature this small overflows float32 in every slot
    loss = loss_settings(coord_ids=COORD_IDS, temperature_coord=1e-42, keeps_non_finite=True)
    broker = FakeBroker(1)
    for ratio, error in (("1", RunStopped), ("0", NonFiniteLoss)):
        with pytest.raises(error, match="not finite"):
            run_one(one_rank(), settings_for(tmp_path, "run", loss=loss, b_ratio=ratio), broker)
    assert broker.quarantined == []
