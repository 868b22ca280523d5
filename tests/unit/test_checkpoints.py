"""Checkpoints and published policies: whole or absent, Hugging Face loadable, exact to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from broker_schemas.errors import RunStopped
from learner import tensor_files, whole_directory
from learner.checkpoints import TrainerState, latest_checkpoint, read_trainer_state, restore_checkpoint
from learner.companions import Companions
from learner.optimization import build_optimizer
from learner.trained_weights import TrainedWeights
from learner.weights import is_publication_due, policy_version_at, publish_weights
from tests.builders.learner_runs import companions_of, one_rank, write_checkpoint
from tests.builders.learners import tiny_model
from tests.builders.settings import optimization_settings

pytestmark = pytest.mark.req("Q-10")


@pytest.fixture
def companions(tmp_path: Path) -> Companions:
    folder = tmp_path / "companions"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "config.json").write_text("other config", encoding="utf-8")
    return companions_of(folder, min_pixels=4096, max_pixels=16384)


def trained(seed: int = 0, num_steps: int = 2) -> tuple[TrainedWeights, torch.optim.AdamW]:
    """Return a model's weights and its optimizer after some steps of made-up gradients."""
    model = tiny_model(seed=seed)
    optimizer = build_optimizer(model.named_parameters(), optimization_settings(weight_decay=0.1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return TrainedWeights(model), optimizer


def write(
    parent: Path, companions: Companions, optimizer_step: int = 7, num_kept: int = 2, seed: int = 0
) -> Path:
    model, optimizer = trained(seed)
    return write_checkpoint(
        parent,
        trained=model,
        optimizer=optimizer,
        state=TrainerState(optimizer_step=optimizer_step, best_f1=0.25, totals={"steps": 7.0}),
        companions=companions,
        num_kept=num_kept,
        ranks=one_rank(),
    )


def equal_weights(first: Any, second: Any) -> bool:
    other = second.tensors()
    return all(torch.equal(value, other[name]) for name, value in first.tensors().items())


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions)
    model, optimizer = trained()
    other, other_optimizer = trained(seed=9)
    state = restore_checkpoint(path, other, other_optimizer)
    assert state == TrainerState(optimizer_step=7, best_f1=0.25, totals={"steps": 7.0})
    assert equal_weights(model, other)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    pairs = ((model, optimizer), (other, other_optimizer))
    for generator, (stepped, its_optimizer) in zip(generators, pairs, strict=True):
        for parameter in stepped.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        its_optimizer.step()
    assert equal_weights(model, other)


def test_the_random_state_is_restored(tmp_path: Path, companions: Companions) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        path = write(tmp_path / "run", companions)
        expected = torch.rand(3)
        torch.manual_seed(99)
        restore_checkpoint(path, *trained())
        assert torch.equal(torch.rand(3), expected)


def test_it_is_a_hugging_face_folder_with_the_companions_of_the_model(
    tmp_path: Path, companions: Companions
) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    path = write(tmp_path / "run", companions)
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(path)
    assert equal_weights(TrainedWeights(loaded), trained()[0])
    assert json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) == {"a": 1}
    processor = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor == {"size": {"shortest_edge": 4096, "longest_edge": 16384}}
    assert json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3_vl"


def test_nothing_in_it_is_a_pickle(tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions)
    assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors"}


def test_the_latest_is_the_one_with_the_highest_step_and_only_the_last_are_kept(
    tmp_path: Path, companions: Companions
) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for optimizer_step in (9, 10, 100):
        write(tmp_path / "run", companions, optimizer_step, num_kept=2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-10", "checkpoint-100"]
    latest = latest_checkpoint(tmp_path / "run")
    assert latest is not None
    assert latest.name == "checkpoint-100"


@pytest.mark.parametrize("at", ["fsync", "_sync", "rename"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_says_so(
    at: str, tmp_path: Path, companions: Companions, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", companions, 5)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "checkpoint-5").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if at == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(tensor_files.os if at == "fsync" else whole_directory, at, full)
    for optimizer_step in (5, 6):
        with pytest.raises(RunStopped, match=rf"checkpoint-{optimizer_step}.*No space left.*free some space"):
            write(tmp_path / "run", companions, optimizer_step, seed=4)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-5"]
    after = {file.name: file.read_bytes() for file in (tmp_path / "run" / "checkpoint-5").iterdir()}
    assert after == before


def test_a_half_written_directory_of_a_killed_run_is_no_checkpoint(
    tmp_path: Path, companions: Companions
) -> None:
    write(tmp_path / "run", companions, 5)
    left_over = tmp_path / "run" / ".writing-checkpoint-6"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-8").mkdir()
    latest = latest_checkpoint(tmp_path / "run")
    assert latest is not None
    assert latest.name == "checkpoint-5"
    write(tmp_path / "run", companions, 6)
    assert read_trainer_state(tmp_path / "run" / "checkpoint-6").optimizer_step == 6
    whole_directory.remove_leftovers(tmp_path / "run")
    assert not left_over.exists()


@pytest.mark.req("L-6")
def test_leftovers_that_nobody_can_remove_stop_neither_writing_nor_clearing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [".replaced-v3", ".writing-v3", ".replaced-v1"]
    for name in names[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"old")
    (tmp_path / names[2]).write_bytes(b"a file is in the way")
    for number in (1, 2, 3):
        (tmp_path / f"v{number}").mkdir()
    monkeypatch.setattr(whole_directory, "_remove", lambda path: None)

    with whole_directory.whole_directory(tmp_path / "v3") as staging:
        (staging / "weights").write_bytes(b"new")
    removed = whole_directory.keep_last(tmp_path, "v", 1)
    assert (tmp_path / "v3" / "weights").read_bytes() == b"new"
    assert [path.name for path in removed] == ["v1", "v2"]
    assert [path.name for _, path in whole_directory.numbered_directories(tmp_path, "v")] == ["v3"]

    monkeypatch.undo()
    whole_directory.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["v3"]


def test_writing_the_same_step_again_replaces_it(tmp_path: Path, companions: Companions) -> None:
    write(tmp_path / "run", companions, 5, seed=1)
    write(tmp_path / "run", companions, 5, seed=2)
    model, optimizer = trained(seed=0)
    restore_checkpoint(tmp_path / "run" / "checkpoint-5", model, optimizer)
    assert equal_weights(model, trained(seed=2)[0])


def test_a_broken_file_is_named(tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions)
    (path / "optimizer.safetensors").write_bytes(b"broken")
    with pytest.raises(RunStopped, match=r"optimizer\.safetensors"):
        restore_checkpoint(path, *trained())
    (path / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunStopped, match=r"trainer_state\.json"):
        read_trainer_state(path)


WRONG_VALUES = ["null", "-5", "Infinity", "-Infinity", "NaN", "1.5", "true", '"6"', "[]", "{}"]


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("name", ["optimizer_step", "policy_version", "best_f1", "totals", "run_id"])
def test_a_value_that_no_run_could_have_is_refused_by_name(
    name: str, value: str, tmp_path: Path, companions: Companions
) -> None:
    path = write(tmp_path / "run", companions) / "trainer_state.json"
    body = json.loads(path.read_text())
    allowed = {"best_f1": ("-5", "1.5"), "totals": ("{}",), "run_id": ('"6"',)}
    if value in allowed.get(name, ()):
        return
    path.write_text(json.dumps(body | {name: "HERE"}).replace('"HERE"', value))

    with pytest.raises(RunStopped, match=f"trainer_state.json: not a trainer state .*{name}"):
        read_trainer_state(path.parent)


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("text", ["[]", "3", "null", "", '{"format": 1}', "[" * 100_000])
def test_what_is_no_trainer_state_is_refused(text: str, tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions) / "trainer_state.json"
    path.write_text(text)

    with pytest.raises(RunStopped, match=r"trainer_state\.json: not a trainer state"):
        read_trainer_state(path.parent)


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random_state.safetensors"])
@pytest.mark.parametrize("wrong", ["one bit", "shorter", "gone"])
def test_one_flipped_bit_in_any_file_is_found_and_named(
    name: str, wrong: str, tmp_path: Path, companions: Companions
) -> None:
    path = write(tmp_path / "run", companions) / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 16
    if wrong == "one bit":
        path.write_bytes(raw)
    elif wrong == "shorter":
        path.write_bytes(raw[:-4])
    else:
        path.unlink()

    with pytest.raises(RunStopped, match=name.replace(".", r"\.")):
        restore_checkpoint(path.parent, *trained())


@pytest.mark.req("Q-20")
def test_a_checkpoint_from_before_checksums_is_still_read(tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions)
    (path / "checksums.json").unlink()

    restore_checkpoint(path, *trained())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, companions: Companions) -> None:
    path = write(tmp_path / "run", companions)
    model, optimizer = trained()
    del model.model.model.visual.merger
    with pytest.raises(RunStopped, match="weights of another model"):
        restore_checkpoint(path, model, optimizer)


@pytest.mark.req("V-6")
def test_the_policy_version_is_a_function_of_the_step() -> None:
    assert [policy_version_at(step, 2) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [is_publication_due(done, 2) for done in (1, 2, 3, 4)] == [False, True, False, True]


@pytest.mark.req("V-2")
def test_published_policies_are_whole_folders_and_the_last_ones_stay(
    tmp_path: Path, companions: Companions
) -> None:
    weights, _ = trained()
    for policy_version in range(3):
        path = publish_weights(
            tmp_path / "policy",
            trained=weights,
            policy_version=policy_version,
            companions=companions,
            num_kept=2,
        )
        assert path == tmp_path / "policy" / f"v{policy_version}"
    assert sorted(entry.name for entry in (tmp_path / "policy").iterdir()) == ["v1", "v2"]
    assert (tmp_path / "policy" / "v2" / "tokenizer.json").is_file()


@pytest.mark.req("L-6")
def test_the_best_checkpoint_stays_beside_the_latest(tmp_path: Path, companions: Companions) -> None:
    weights, optimizer = trained()
    for done in (2, 4, 6, 8):
        write_checkpoint(
            tmp_path / "run",
            trained=weights,
            optimizer=optimizer,
            state=TrainerState(optimizer_step=done, best_f1=0.5, best_step=2),
            companions=companions,
            num_kept=2,
            ranks=one_rank(),
        )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
    ]
