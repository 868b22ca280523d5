"""Samples that cannot be trained or shown are found before a run starts, refused, or left out and counted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import read_dataset
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.trainability import SampleRuler, examine_samples
from configs import RunConfig
from learner.channel_a import build_segment
from rollstream.commands.program import app
from rollstream.doctor import examining as doctor
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.wiring import access
from rollstream.wiring.trainable import find_untrainable, read_samples, sample_ruler, write_untrainable
from tests.builders.configs import load_mapping, make_mapping, write_file
from tests.builders.datasets import write_jsonl, write_picture

OBJECTS = [
    {"desc": "RBC", "bbox_2d": [10, 20, 300, 400]},
    {"desc": "leaf", "poly": [100, 10, 300, 200, 50, 400]},
]


def line(name: str, width: int = 64, height: int = 48, **changes: Any) -> dict[str, Any]:
    content = {"images": [f"{name}.png"], "width": width, "height": height, "objects": OBJECTS}
    return content | {"metadata": {"sample_id": name}} | changes


def mapping_of(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    write_picture(folder / "good.png")
    write_jsonl(folder / "train.jsonl", [line("good"), *lines])
    write_jsonl(folder / "val.jsonl", [line("good")])
    return make_mapping(
        run__output_dir=str(folder / "runs"),
        data__train_jsonl=str(folder / "train.jsonl"),
        data__val_jsonl=str(folder / "val.jsonl"),
        model__name_or_path=str(SHIPPED_MODEL),
        training__global_max_length=256,
        **settings,
    )


def config_of(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> RunConfig:
    return load_mapping(folder, mapping_of(folder, lines, **settings))


def bad_lines(folder: Path) -> list[dict[str, Any]]:
    """Write a sample of every kind that cannot be used, and return their lines."""
    write_picture(folder / "long.png")
    write_picture(folder / "flat.png", 3000, 10)
    write_picture(folder / "wrong.png", 60, 48)
    for name in ("torn", "text", "turned", "token", "chat"):
        write_picture(folder / f"{name}.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "turned.png", exif=exif)
    return [
        line("long", objects=OBJECTS * 20),
        line("flat", 3000, 10),
        line("wrong"),
        line("torn"),
        line("text"),
        line("turned"),
        line("gone"),
        line("token", objects=[{"desc": "a <|endoftext|> b", "bbox_2d": [1, 2, 3, 4]}]),
    ]


REASONS = {
    "long": "too_long",
    "flat": "image_shape",
    "wrong": "size_differs",
    "torn": "unreadable_image",
    "text": "unreadable_image",
    "turned": "turned_image",
    "gone": "unreadable_image",
    "token": "control_token",
}


@pytest.mark.req("D-3")
def test_every_kind_of_untrainable_sample_is_found_by_its_reason(tmp_path: Path) -> None:
    config = config_of(tmp_path, bad_lines(tmp_path), data__skip_untrainable=True)

    found = find_untrainable(config)

    problems = {item.sample_id: item.reason for item in found[str(tmp_path / "train.jsonl")]}
    assert problems == REASONS


@pytest.mark.req("D-3")
def test_a_run_refuses_to_start_on_them_and_names_key_and_samples(tmp_path: Path) -> None:
    config = config_of(tmp_path, bad_lines(tmp_path)[:3])

    with pytest.raises(DataError, match="3 of 4 samples cannot be trained or shown") as caught:
        find_untrainable(config)

    for words in ("data.skip_untrainable: true", "long: ", "training.global_max_length is 256", "flat: "):
        assert words in str(caught.value)


@pytest.mark.req("D-3")
def test_left_out_they_are_written_down_and_no_role_sees_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, bad_lines(tmp_path), data__skip_untrainable=True)
    train = config.data.train_jsonl

    # a role alone, on a machine without the run folder, finds them itself
    assert [sample.sample_id for sample in read_samples(config, train)] == ["good"]
    access.run_folder(config).path.mkdir(parents=True)
    write_untrainable(config, find_untrainable(config))
    written = json.loads(access.run_folder(config).untrainable.read_text())
    (tmp_path / "wrong.png").unlink()

    assert {name: entry["reason"] for name, entry in written[train].items()} == REASONS
    assert [sample.sample_id for sample in read_samples(config, train)] == ["good"]


@pytest.mark.req("D-3", "U-2")
def test_the_command_lists_them_with_the_values_to_set(tmp_path: Path) -> None:
    file = write_file(tmp_path, mapping_of(tmp_path, bad_lines(tmp_path)))

    done = CliRunner().invoke(app, ["data", "check", str(file)])
    clean = write_file(tmp_path, mapping_of(tmp_path, []), "clean.yaml")
    good = CliRunner().invoke(app, ["data", "check", str(clean)])
    as_json = CliRunner().invoke(app, ["data", "check", str(clean), "--json"])

    assert isinstance(done.exception, DataError)
    for words in ("train: 9 samples, 8 that cannot", "longest:", "holds all", "skip_untrainable"):
        assert words in done.output
    assert (good.exit_code, as_json.exit_code) == (0, 0)
    assert "next: rollstream doctor" in good.output
    assert json.loads(as_json.output)["train"]["num_samples"] == 1


@pytest.mark.req("D-3")
def test_the_doctor_fails_on_them_and_warns_of_rollouts_too_short(tmp_path: Path) -> None:
    short = {"custom__extra__rollout_matching__max_new_tokens": 20}
    train, *_ = doctor.examine_data(config_of(tmp_path, bad_lines(tmp_path)))
    assert train.verdict == "fail"
    assert "rollstream data check" in train.remedy
    findings = list(doctor.examine_data(config_of(tmp_path, [], **short)))
    assert [item.verdict for item in findings] == ["ok", "warn", "ok", "warn"]
    assert "max_new_tokens" in findings[1].remedy


@pytest.mark.req("D-3")
def test_lengths_are_those_of_the_segments_that_are_trained(tmp_path: Path) -> None:
    lines = [
        line(
            f"s{number}",
            objects=[dict(item, desc=f"{item['desc']} {number} é <|coord_5|>") for item in OBJECTS] * number,
        )
        for number in range(4)
    ]
    for entry in lines:
        write_picture(tmp_path / entry["images"][0])
    config = config_of(tmp_path, lines)
    prompts = access.prompt_builder(config, SHIPPED_MODEL)
    images = access.image_processor(config, SHIPPED_MODEL, config.data.train_jsonl)
    ruler = sample_ruler(config)

    for sample in read_samples(config, config.data.train_jsonl):
        segment = build_segment(
            sample,
            sample.objects,
            [images.grid_for_size(sample.width, sample.height)],
            prompts,
            record_id="r",
            policy_version=0,
            optimizer_step=0,
            processor_fingerprint="f",
        )
        length = ruler.length(sample)
        assert (length.prompt, length.total) == (segment.prompt_length, len(segment.token_ids))


@pytest.mark.parametrize("bounds", [(None, None), (16384, 76800), (3136, 12845056), (200704, 1003520)])
def test_grids_are_those_of_the_image_processor(
    tmp_path: Path, bounds: tuple[int | None, int | None]
) -> None:
    low, high = bounds
    processor = ImageProcessor(SHIPPED_MODEL, tmp_path, min_pixels=low, max_pixels=high)
    grid = ImageGrid.of_model(SHIPPED_MODEL, min_pixels=low, max_pixels=high)
    for width in (1, 9, 33, 64, 199, 200, 201, 640, 1333, 4000):
        for height in (1, 7, 20, 48, 199, 480, 801, 3999):
            try:
                expected = processor.grid_for_size(width, height)
            except DataError:
                with pytest.raises(DataError, match="no processor takes"):
                    grid.grid(width, height)
            else:
                assert grid.grid(width, height) == expected, (width, height)


@pytest.mark.req("D-3", "U-2")
def test_a_thousand_images_are_looked_at_in_a_second_or_two(tmp_path: Path) -> None:
    write_picture(tmp_path / "good.jpg", 640, 480)
    data = (tmp_path / "good.jpg").read_bytes()
    lines = []
    for number in range(1000):
        (tmp_path / f"p{number}.jpg").write_bytes(data)
        objects = [{"desc": f"cell {number % 7}", "bbox_2d": [number % 900, k, 950, 900]} for k in range(20)]
        lines.append({"images": [f"p{number}.jpg"], "width": 640, "height": 480, "objects": objects})
    samples = read_dataset(write_jsonl(tmp_path / "many.jsonl", lines))
    config = config_of(tmp_path, [])
    ruler = SampleRuler(access.prompt_builder(config, SHIPPED_MODEL), ImageGrid.of_model(SHIPPED_MODEL))

    started = time.process_time()
    report = examine_samples(samples, ruler, max_length=1000)
    seconds = time.process_time() - started

    assert report.problems == ()
    assert seconds < 2, seconds
