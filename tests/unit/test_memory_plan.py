"""`doctor --memory`: weights counted exactly, rows within a tenth of what is measured, advice that helps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from broker_schemas.errors import ConfigError, DataError
from configs import load_config
from learner.packed_forward import position_rule_of
from rollstream.commands.program import app
from rollstream.doctor import memory
from rollstream.doctor.fitting_table import FittingRow, render_fitting
from rollstream.doctor.memory_meter import MemoryMeter, measure_peak
from rollstream.doctor.memory_plan import MemorySizes, Remedy, advice, plan_memory
from rollstream.doctor.row_probe import PROBE_FIRST_COORDINATE, Line, RowCost, probe_row
from rollstream.models.model_shape import shape_of_config
from rollstream.models.named_sizes import first_coordinate_id, named_config, sizes_named
from rollstream.models.practice_learner import PracticeLearner, PracticeSettings
from rollstream.models.practice_rows import RowShape, practice_row
from tests.builders.configs import make_mapping, write_file
from tests.builders.learners import adapter_settings

GB = 10**9
SIZES = MemorySizes(
    trained=4 * GB,
    frozen=0,
    published=4 * GB,
    row_bytes=5 * GB,
    passing_bytes=GB,
    precision="bf16",
    num_sharing=1,
    num_ranks_here=2,
    cache_bytes=GB,
)


def test_the_published_sizes_have_the_weights_that_their_cards_say() -> None:
    for name, billions in (("2B", 2.13), ("4B", 4.44), ("8B", 8.77)):
        shape = shape_of_config(named_config(sizes_named(name)))
        assert shape.total / 1e9 == pytest.approx(billions, abs=0.02)
    four = shape_of_config(named_config(sizes_named("4B")))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert 2 * four.adapter_weights(16, targets, is_dora=False) == pytest.approx(66e6, rel=0.01)
    with pytest.raises(DataError, match="got '7B', expected one of tiny, 2B"):
        sizes_named("7B")


def test_bytes_of_a_rank_by_hand() -> None:
    plan = plan_memory(SIZES)
    assert (plan.weights, plan.gradients, plan.moments) == (24 * GB, 16 * GB, 32 * GB)
    assert plan.rank == 78 * GB
    assert (plan.sync, plan.checkpoint) == (8 * GB, 48 * GB)
    shared = plan_memory(replace(SIZES, num_sharing=4))
    assert (shared.weights, shared.gradients, shared.moments, shared.row) == (4 * GB, 4 * GB, 8 * GB, 5 * GB)
    frozen = plan_memory(replace(SIZES, trained=0, frozen=4 * GB))
    assert (frozen.weights, frozen.gradients, frozen.moments) == (8 * GB, 0, 0)
    adapter = plan_memory(
        replace(SIZES, trained=GB // 100, frozen=4 * GB, published=GB // 100, is_frozen_kept=False)
    )
    assert (adapter.weights, adapter.sync, adapter.checkpoint) == (8_060_000_000, 20_000_000, 120_000_000)
    spread = plan_memory(replace(SIZES, trained=0, frozen=4 * GB, num_sharing=4))
    assert spread.weights == 2 * GB
    gathered = plan_memory(replace(SIZES, num_sharing=4, outside_layers=GB, largest_layer=GB // 10))
    assert gathered.gathered == 2 * GB + 2 * 2 * GB // 10 + 6 * GB // 10
    assert plan_memory(replace(SIZES, outside_layers=GB)).gathered == 0
    exact = plan_memory(replace(SIZES, precision="float32"))
    assert (exact.weights, exact.gradients, exact.moments) == (16 * GB, 16 * GB, 32 * GB)


def test_what_does_not_fit_comes_with_what_to_change() -> None:
    remedy = Remedy(can_checkpoint_activations=True, can_shard=True, can_use_lora=True, row_tokens=12_000)
    assert advice(plan_memory(SIZES), 141 * GB, remedy) == []
    said = " ".join(advice(plan_memory(SIZES), 80 * GB, remedy))
    for key in ("activation_checkpointing", "sharding: full", "lora.rank"):
        assert f"training.{key}" in said
    nothing = replace(
        remedy, can_checkpoint_activations=False, can_shard=False, can_use_lora=False, row_tokens=512
    )
    assert "more ranks" in advice(plan_memory(SIZES), 40 * GB, nothing)[0]


def test_the_meter_sees_what_is_held_at_one_time() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first * 2
        del first
        third = second + 1
        del second, third

    assert measure_peak(work, torch.device("cpu")) == 8000
    held = torch.zeros(500)
    with MemoryMeter() as meter:
        held.add_(1)
    assert meter.peak_bytes == 0


SMALL = replace(
    sizes_named("tiny"), hidden=96, heads=3, key_value_heads=3, intermediate=256, deepstack_layers=(0, 1, 2)
)
IDS = tuple(range(first_coordinate_id(SMALL), first_coordinate_id(SMALL) + 1000))
RECIPES = {
    "full": PracticeSettings(precision="bf16"),
    "float32": PracticeSettings(precision="float32", loss_chunk_positions=64),
    "checkpointing": PracticeSettings(precision="bf16", is_checkpointing_activations=True),
    "dora": PracticeSettings(
        precision="bf16",
        is_checkpointing_activations=True,
        adapter=adapter_settings(rank=16, is_dora=True, coordinate_ids=IDS),
    ),
}


@pytest.mark.req("L-12")
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_rank_takes_is_predicted_within_a_tenth(name: str) -> None:
    config, settings = named_config(SMALL), replace(RECIPES[name], attention="segments")
    settings = replace(settings, first_coordinate_id=IDS[0])
    practice = PracticeLearner(config, settings, torch.device("cpu"))
    shape = RowShape(num_segments=2, image_grid=(24, 32), prompt_tokens=60)
    row = practice_row(shape, config, IDS[0], position_rule_of(practice.model))
    measure_peak(lambda: practice.backward([row]), practice.device, skips_products=True)
    measured_row = measure_peak(lambda: practice.backward([row]), practice.device, skips_products=True)
    measured = measured_row + held_bytes(practice)

    first, adapter = PROBE_FIRST_COORDINATE, settings.adapter
    if adapter is not None:
        adapter = replace(adapter, coordinate_ids=tuple(range(first, first + 1000)))
    cost = probe_row(config, replace(settings, first_coordinate_id=first, adapter=adapter))
    positions = min(settings.loss_chunk_positions or shape.num_supervised, shape.num_supervised)
    size = (shape.num_tokens, shape.num_patches)
    trained = sum(parameter.numel() for parameter in practice.trained.parameters.values())
    whole = shape_of_config(config).total
    plan = plan_memory(
        replace(
            SIZES,
            trained=trained,
            frozen=whole if adapter is not None else whole - trained,
            row_bytes=cost.kept_bytes(*size),
            passing_bytes=cost.passing_bytes(*size, positions),
            precision=settings.precision,
        )
    )

    assert plan.row + plan.passing == pytest.approx(measured_row, rel=0.1)
    assert plan.rank == pytest.approx(measured, rel=0.1)


def held_bytes(practice: PracticeLearner) -> int:
    """Return what weights, gradients and both moments hold beside any row."""
    trained = list(practice.trained.parameters.values())
    tensors = [*practice.model.parameters(), *trained]
    tensors += [parameter.grad for parameter in trained if parameter.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + 2 * sum(4 * parameter.numel() for parameter in trained)


def test_the_command_prints_a_table_and_ends_with_1_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = RowCost(kept=Line(fixed=1_000_000, per_token=100_000, per_patch=30_000))
    monkeypatch.setattr(memory, "probe_row", lambda config, settings: cost)
    mapping = make_mapping(run__output_dir=str(tmp_path), training__global_max_length=4096)
    path = write_file(tmp_path, mapping)
    run = CliRunner().invoke

    fits = run(app, ["doctor", str(path), "--memory", "--size", "tiny", "--gpu-gb", "80"])
    tight = run(app, ["doctor", str(path), "--memory", "--size", "tiny", "--gpu-gb", "0.1"])

    assert fits.exit_code == 0
    assert "fits:" in fits.output
    assert "a row of 4,096 tokens" in fits.output
    assert tight.exit_code == 1
    assert "does not fit" in tight.output
    assert "change: training." in tight.output
    without = run(app, ["doctor", str(path), "--size", "tiny"])
    assert isinstance(without.exception, ConfigError)
    unknown = run(app, ["doctor", str(path), "--memory"])
    assert isinstance(unknown.exception, ConfigError)
    assert "--size 2B" in str(unknown.exception)


TABLE_LINE = re.compile(r"\| (2B|4B|8B) \| ([\d.]+) \| ([\d.]+) \| (.*) \|")
ROOT = Path(__file__).parents[2]


@pytest.mark.req("L-12", "L-14")
@pytest.mark.parametrize(
    "recipe, title", [("photos", "| all weights |"), ("photos_lora", "| LoRA rank 16 |")]
)
def test_the_table_of_what_fits_where_is_that_of_the_command(recipe: str, title: str) -> None:
    config = load_config(ROOT / "configs" / "recipes" / f"{recipe}.yaml")
    page = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
    written = title + page.partition(title)[2].partition("\n\n")[0]
    rows = [
        FittingRow(size=size, kept=round(float(kept) * 1e9), passing=round(float(passing) * 1e9))
        for size, kept, passing, _ in TABLE_LINE.findall(written)
    ]
    assert [row.size for row in rows] == ["2B", "4B", "8B"]
    assert render_fitting(config, rows) == written.strip()


def test_the_table_wants_no_choice_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "probe_row", lambda config, settings: RowCost(kept=Line(per_token=1e5)))
    path = write_file(tmp_path, make_mapping(training__global_max_length=4096))
    run = CliRunner().invoke

    shown = run(app, ["doctor", str(path), "--memory", "--table"])
    assert shown.exit_code == 0
    assert "| 2B | 0.41 |" in shown.output
    chosen = run(app, ["doctor", str(path), "--memory", "--table", "--size", "2B"])
    assert isinstance(chosen.exception, ConfigError)
    alone = run(app, ["doctor", str(path), "--table"])
    assert isinstance(alone.exception, ConfigError)
