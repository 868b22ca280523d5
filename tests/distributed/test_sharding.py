"""L-3: a model spread over two gloo ranks has the losses and weights of a whole one, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from broker_schemas.errors import ConfigError
from broker_schemas.method.adapter_folder import read_adapter
from broker_schemas.records.packs import ReadyPack, StepClaim
from broker_schemas.records.records import MatchedSegment
from learner.checkpoints import restore_checkpoint
from learner.optimization import build_optimizer
from learner.packed_forward import RowLoss
from learner.sharding import Sharding, local_part, place_model
from learner.trained_weights import TrainedWeights
from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker, step_packs
from tests.builders.learner_runs import NUM_STEPS, one_rank, run_one, settings_for, untimed, weights_in
from tests.builders.learners import adapter_settings, tiny_model
from tests.builders.settings import optimization_settings
from tests.distributed.rank_processes import meet, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ADAPTER_RUNS: dict[str, dict[str, Any]] = {
    "adapter-none": {},
    "adapter-full": {"sharding": "full"},
    "adapter-bf16": {"sharding": "full", "precision": "bf16"},
    "adapter-bf16-none": {"precision": "bf16"},
}


class UnevenBroker(FakeBroker):
    """Gives rank 0 both packs of a B step and rank 1 none."""

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        claim = super().claim_step(
            optimizer_step=optimizer_step, scheduled_kind=scheduled_kind, policy_version=policy_version
        )
        if claim is None or claim.kind == "A":
            return claim
        packs: list[ReadyPack] = step_packs(optimizer_step)
        return StepClaim(
            optimizer_step=optimizer_step,
            kind="B",
            reason="claimed",
            policy_version=policy_version,
            packs=(tuple(packs), ()),
        )


def _run(rank: int, folder: Path, name: str, broker: FakeBroker, **changes: Any) -> None:
    ranks = meet(folder, name, rank)
    run_one(ranks, settings_for(folder, name.partition("@")[0], **changes), broker)
    ranks.close()


def _broken_segment(segment: MatchedSegment) -> MatchedSegment:
    return replace(segment, processor_fingerprint="other") if segment.record_id == "s1-p1-r2" else segment


def _all_in_turn(rank: int, folder: Path) -> None:
    _run(rank, folder, "none", FakeBroker(2))
    _run(rank, folder, "full", FakeBroker(2), sharding="full")
    _run(rank, folder, "cut@1", FakeBroker(2), sharding="full", max_steps=4)
    _run(rank, folder, "cut@2", FakeBroker(2), sharding="full")
    broken = FakeBroker(2, change_segment=_broken_segment)
    _run(rank, folder, "quarantined", broken, sharding="full", max_steps=2)
    _run(rank, folder, "mixed@1", FakeBroker(2), max_steps=4)
    _run(rank, folder, "mixed@2", FakeBroker(2), sharding="full")
    _run(rank, folder, "hybrid", FakeBroker(2), sharding="hybrid")
    _run(rank, folder, "uneven-none", UnevenBroker(2))
    _run(rank, folder, "uneven-full", UnevenBroker(2), sharding="full")
    _run(rank, folder, "bf16", FakeBroker(2), sharding="full", precision="bf16")
    for name, changes in ADAPTER_RUNS.items():
        _run(rank, folder, name, FakeBroker(2), adapter=adapter_settings(), **changes)
    ranks = meet(folder, "parts", rank)
    row_loss = RowLoss(tiny_model(seed=3) if rank == 0 else tiny_model(seed=4).to("meta"))
    place_model(row_loss, ranks, "full", "float32")
    held = sum(local_part(p).numel() for p in row_loss.parameters())
    (folder / f"held-{rank}.txt").write_text(str(held), encoding="utf-8")
    ranks.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    assert run_ranks(_all_in_turn, folder, timeout_s=500) == [0, 0]
    return folder


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = read_json_lines(folder / name / "train_log.jsonl")
    return [untimed(row) for row in rows]


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return weights_in(folder / name / "checkpoints" / f"checkpoint-{NUM_STEPS}")


def adapter_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_adapter(folder / name / "checkpoints" / f"checkpoint-{NUM_STEPS}").tensors


@pytest.mark.timeout(600)
@pytest.mark.req("L-3")
@pytest.mark.parametrize("name", ["full", "cut", "mixed", "hybrid"])
def test_a_sharded_run_has_the_losses_norms_and_weights_of_a_whole_one(folder: Path, name: str) -> None:
    assert rows_of(folder, name) == rows_of(folder, "none")
    expected, found = weights_of(folder, "none"), weights_of(folder, name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.timeout(600)
@pytest.mark.req("L-6")
@pytest.mark.parametrize("name", ["full", "hybrid"])
def test_one_rank_reads_what_two_have_written_in_parts(folder: Path, name: str) -> None:
    checkpoint = folder / name / "checkpoints" / "checkpoint-4"
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert files == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer-1.safetensors",
        "optimizer.safetensors",
        "random_state.safetensors",
    ]
    found, expected = (
        _restored(path) for path in (checkpoint, folder / "none" / "checkpoints" / "checkpoint-4")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def _restored(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = tiny_model(seed=9)
    optimizer = build_optimizer(model.named_parameters(), optimization_settings())
    trained = TrainedWeights(model)
    assert restore_checkpoint(checkpoint, trained, optimizer).optimizer_step == 4
    moments = {
        f"{name}/{entry}": value
        for name, parameter in trained.parameters.items()
        for entry, value in optimizer.state[parameter].items()
    }
    return trained.untied_tensors() | moments


@pytest.mark.timeout(600)
@pytest.mark.req("L-3", "S-7")
def test_a_rank_without_packs_keeps_step_with_the_others(folder: Path) -> None:
    found, expected = rows_of(folder, "uneven-full"), rows_of(folder, "uneven-none")
    assert [row["num_segments"] for row in found] == [row["num_segments"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    for key, value in weights_of(folder, "uneven-full").items():
        torch.testing.assert_close(value, weights_of(folder, "uneven-none")[key], atol=2e-4, rtol=1e-3)


@pytest.mark.timeout(600)
@pytest.mark.req("L-3", "Q-13")
def test_a_rank_that_cannot_train_a_segment_lets_no_other_wait(folder: Path) -> None:
    assert [row["num_segments"] for row in rows_of(folder, "quarantined")] == [4, 5]


@pytest.mark.timeout(600)
@pytest.mark.req("L-3")
def test_each_rank_holds_its_share_and_one_alone_reads_the_model(folder: Path) -> None:
    whole = sum(p.numel() for p in tiny_model().parameters())
    held = [int((folder / f"held-{rank}.txt").read_text(encoding="utf-8")) for rank in range(2)]
    assert all(share == pytest.approx(whole / 2, rel=0.02) for share in held)


@pytest.mark.timeout(600)
@pytest.mark.req("L-2", "L-3")
def test_a_sharded_bfloat16_run_keeps_float32_weights(folder: Path) -> None:
    assert {value.dtype for value in weights_of(folder, "bf16").values()} == {torch.float32}
    found, expected = rows_of(folder, "bf16"), rows_of(folder, "none")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=0.02)


@pytest.mark.timeout(600)
@pytest.mark.req("L-3", "L-5")
def test_a_sharded_adapter_run_has_the_losses_and_weights_of_a_whole_one(folder: Path) -> None:
    assert rows_of(folder, "adapter-full") == rows_of(folder, "adapter-none")
    expected, found = adapter_of(folder, "adapter-none"), adapter_of(folder, "adapter-full")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.timeout(600)
@pytest.mark.req("L-2", "L-3", "L-5")
def test_adapters_in_bfloat16_keep_float32_weights_sharded_or_not(folder: Path) -> None:
    exact = [row["loss"] for row in rows_of(folder, "adapter-none")]
    for name in ("adapter-bf16", "adapter-bf16-none"):
        assert {value.dtype for value in adapter_of(folder, name).values()} == {torch.float32}
        assert [row["loss"] for row in rows_of(folder, name)] == pytest.approx(exact, rel=0.02)


@pytest.mark.req("L-3")
@pytest.mark.parametrize("sharding", ["full", "hybrid"])
def test_one_rank_alone_cannot_share(sharding: Sharding) -> None:
    with pytest.raises(ConfigError, match="one rank, which has nobody to share with"):
        place_model(RowLoss(tiny_model()), one_rank(), sharding, "float32")
