"""What the learner fetches of a coming step while it trains: sooner there, and never trained for itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from broker_schemas.errors import BodyMissing, BrokerUnavailable, RollstreamError
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment
from learner.ports import FetchedPack
from learner.schedule import is_rollout_step
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker, rollout_segment, step_packs
from tests.builders.learner_runs import NUM_STEPS, one_rank, run_one, settings_for

torch.set_num_threads(1)


class Foreseeing(FakeBroker):
    """Shows the packs of a coming step before its claim; notes what is fetched, and when."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(1, **changes)
        self.asked: list[str] = []
        self.shown: list[int] = []
        self.committed: list[int] = []
        self.committed_when_shown: list[int] = []
        self.error: RollstreamError | None = None

    def packs(self, optimizer_step: int) -> list[ReadyPack]:
        return step_packs(optimizer_step)

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        self.shown.append(optimizer_step)
        self.committed_when_shown.append(len(self.committed))
        if self.error is not None:
            raise self.error
        packs = self.packs(optimizer_step)[num_taken:]
        return [(pack, [rollout_segment(name) for name in pack.record_ids]) for pack in packs]

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        self.asked += record_ids
        return super().fetch_segments(record_ids)

    def commit_step(self, **said: Any) -> None:
        self.committed.append(said["optimizer_step"])
        super().commit_step(**said)


def trained(folder: Path, name: str, broker: FakeBroker, b_ratio: str = "1") -> tuple[bytes, list[Any]]:
    run_one(one_rank(), settings_for(folder, name, save_every_steps=0, b_ratio=b_ratio), broker)
    saved = max((folder / name / "checkpoints").glob("**/model.safetensors"))
    rows = read_json_lines(folder / name / "train_log.jsonl")
    return saved.read_bytes(), [(row["kind"], row["loss"], row["num_packs"]) for row in rows]


@pytest.mark.req("S-8", "Q-8")
def test_the_next_step_is_fetched_while_this_one_trains_and_trains_the_same_to_the_bit(
    tmp_path: Path,
) -> None:
    plain = trained(tmp_path, "plain", FakeBroker(1))
    ahead = Foreseeing()

    assert trained(tmp_path, "ahead", ahead) == plain
    assert ahead.asked == [name for pack in step_packs(0) for name in pack.record_ids]
    assert ahead.shown == list(range(1, NUM_STEPS))
    # asked before the step before it was committed: while its last row was computed
    assert ahead.committed_when_shown == list(range(NUM_STEPS - 1))


@pytest.mark.req("Q-8", "P-9")
def test_a_claim_that_names_other_packs_than_were_fetched_is_trained_as_it_says(tmp_path: Path) -> None:
    class Mistaken(Foreseeing):
        def packs(self, optimizer_step: int) -> list[ReadyPack]:
            return [*step_packs(optimizer_step + 7)[:1], *step_packs(optimizer_step)[1:]]

    plain = trained(tmp_path, "plain", FakeBroker(1))
    mistaken = Mistaken()

    assert trained(tmp_path, "mistaken", mistaken) == plain
    # of later steps the one pack that was right is not asked for again
    assert mistaken.asked[6:9] == list(step_packs(1)[0].record_ids)
    assert len(mistaken.asked) == 6 + 3 * (NUM_STEPS - 1)


@pytest.mark.req("Q-8")
@pytest.mark.parametrize("error", [BodyMissing("gone"), BrokerUnavailable("away")])
def test_what_cannot_be_fetched_ahead_is_fetched_in_its_turn(tmp_path: Path, error: RollstreamError) -> None:
    plain = trained(tmp_path, "plain", FakeBroker(1))
    failing = Foreseeing()
    failing.error = error

    assert trained(tmp_path, "failing", failing) == plain
    assert len(failing.asked) == 6 * NUM_STEPS


@pytest.mark.req("S-8")
def test_steps_of_both_kinds_are_prepared_while_the_step_before_trains(tmp_path: Path) -> None:
    plain = trained(tmp_path, "plain", FakeBroker(1), b_ratio="0.5")
    ahead = Foreseeing()

    assert trained(tmp_path, "ahead", ahead, b_ratio="0.5") == plain
    steps = [step for step in range(NUM_STEPS) if is_rollout_step(step, "0.5")]
    assert ahead.shown == [step for step in steps if step > 0]
    assert len(ahead.asked) == 6 * steps.count(0)
