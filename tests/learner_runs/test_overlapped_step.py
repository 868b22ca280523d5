"""Packs that are trained while the rest of their step is generated: the same step, sooner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.errors import RunStopped
from broker_schemas.records.packs import ReadyPack, StepClaim
from consumers.step_plans import filled_packs
from learner.stop_request import StopRequest
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import PACKS_IN_STEP, SEGMENTS_IN_PACK, FakeBroker, step_packs
from tests.builders.learner_runs import one_rank, run_one, settings_for

torch.set_num_threads(1)
ROLLOUTS_IN_STEP = PACKS_IN_STEP * SEGMENTS_IN_PACK
Kind = Literal["A", "B"]


class Trickling(FakeBroker):
    """One pack of a B step is there at once; its claim comes after it was looked at."""

    def __init__(self, world_size: int, **changes: Any) -> None:
        super().__init__(world_size, **changes)
        self.num_looks = 0
        self.stop = StopRequest()
        self.stops_at_look = 10**9
        self.shown = 0

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Kind, policy_version: int
    ) -> StepClaim | None:
        if scheduled_kind == "B" and self.num_looks < 2:
            return None
        self.num_looks = 0
        return super().claim_step(
            optimizer_step=optimizer_step, scheduled_kind=scheduled_kind, policy_version=policy_version
        )

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        self.num_looks += 1
        self.shown += 1
        if self.shown >= self.stops_at_look:
            self.stop.set()
        return (tuple(step_packs(optimizer_step)[:1]),)


def weights_of(folder: Path, name: str, broker: FakeBroker, **changes: Any) -> tuple[bytes, list[Any]]:
    run_one(one_rank(), settings_for(folder, name, save_every_steps=0, **changes), broker)
    saved = max((folder / name / "checkpoints").glob("**/model.safetensors"))
    rows = read_json_lines(folder / name / "train_log.jsonl")
    return saved.read_bytes(), [(row["kind"], row["loss"], row["num_packs"]) for row in rows]


@pytest.mark.req("S-8", "P-9")
def test_a_step_trained_as_its_packs_fill_is_the_same_step_to_the_bit(tmp_path: Path) -> None:
    claimed = weights_of(tmp_path, "claimed", FakeBroker(1))
    trickling = Trickling(1)

    overlapped = weights_of(tmp_path, "overlapped", trickling, num_rollouts_in_step=ROLLOUTS_IN_STEP)

    assert overlapped == claimed
    assert trickling.shown > 0


@pytest.mark.req("S-8", "P-9")
def test_a_step_with_another_number_of_rollouts_than_expected_is_trained_over_the_right_number(
    tmp_path: Path,
) -> None:
    claimed = weights_of(tmp_path, "claimed", FakeBroker(1))

    overlapped = weights_of(tmp_path, "overlapped", Trickling(1), num_rollouts_in_step=ROLLOUTS_IN_STEP - 1)

    assert overlapped == claimed


@pytest.mark.req("S-8")
def test_a_stop_before_the_claim_leaves_no_trace_of_the_packs_that_were_trained(tmp_path: Path) -> None:
    broker = Trickling(1)
    broker.stops_at_look = 2
    settings_ = settings_for(tmp_path, "run", b_ratio="1", num_rollouts_in_step=ROLLOUTS_IN_STEP)

    outcome = run_one(one_rank(), settings_, broker, stop=broker.stop)

    assert (outcome.optimizer_step, outcome.reason) == (0, "stop_requested")
    assert not read_json_lines(tmp_path / "run" / "train_log.jsonl")


@pytest.mark.req("S-8", "Q-8")
def test_a_claim_that_does_not_begin_with_what_was_trained_ends_the_run(tmp_path: Path) -> None:
    class Another(Trickling):
        def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
            super().filled_packs(optimizer_step)
            return (tuple(step_packs(optimizer_step)[1:]),)

    settings_ = settings_for(tmp_path, "run", b_ratio="1", num_rollouts_in_step=ROLLOUTS_IN_STEP)
    with pytest.raises(RunStopped, match="trained packs .'s0-p1'. before its claim"):
        run_one(one_rank(), settings_, Another(1))


@pytest.mark.req("S-8", "P-1")
@given(lengths=st.lists(st.integers(1, 50), max_size=60), cut=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_packs_that_left_are_full_and_what_comes_later_changes_none_of_them(
    lengths: list[int], cut: int
) -> None:
    packs = filled_packs(lengths, 50)

    assert packs[: len(filled_packs(lengths[:cut], 50))] == filled_packs(lengths[:cut], 50)
    taken = [index for pack in packs for index in pack]
    assert len(taken) == len(set(taken))
    assert all(sum(lengths[index] for index in pack) <= 50 for pack in packs)
    left = sum(length for index, length in enumerate(lengths) if index not in set(taken))
    assert left < 1.5 * 50
