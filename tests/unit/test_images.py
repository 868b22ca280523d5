"""Images: confined, opened, and turned into the pixel values that transformers gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from broker_schemas.errors import DataError
from broker_schemas.method.images import ImageProcessor, confine_image_path
from tests.builders.datasets import write_picture


def noise_picture(file: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize("size", [(128, 128), (200, 90)])
def test_pixel_values_and_grid_equal_those_of_transformers(
    tiny_folder: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = noise_picture(tmp_path / "noise.png", *size)
    processor = ImageProcessor(tiny_folder, tmp_path, min_pixels=64 * 64, max_pixels=160 * 160)
    bounds = {"shortest_edge": 64 * 64, "longest_edge": 160 * 160}
    reference = AutoImageProcessor.from_pretrained(tiny_folder, size=bounds)

    pixel_values, grid = processor.load("noise.png")
    expected = reference(images=[Image.open(file)], return_tensors="pt")

    assert pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected["pixel_values"])
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    assert grid == processor.grid_for_size(*size)
    assert pixel_values.shape == (grid[0] * grid[1] * grid[2], 3 * 2 * 16 * 16)


def test_grey_and_transparent_pictures_are_read_as_rgb(tiny_folder: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (64, 64), (100, 100, 100)).save(tmp_path / "rgb.png")
    Image.new("RGBA", (64, 64), (100, 100, 100, 9)).save(tmp_path / "clear.png")
    processor = ImageProcessor(tiny_folder, tmp_path)

    expected, _ = processor.load("rgb.png")

    assert torch.equal(processor.load("grey.png")[0], expected)
    assert torch.equal(processor.load("clear.png")[0], expected)


@pytest.mark.parametrize("path", ["../one.png", "a/../../one.png", "/etc/hosts", "", ".", "a\0b"])
def test_a_path_that_leaves_the_root_is_refused_before_anything_is_opened(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="leaves the data root"):
        confine_image_path(tmp_path / "data", path)


def test_a_path_inside_the_root_is_resolved_against_root_or_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"

    assert confine_image_path(root, "a/../b.png") == root / "b.png"
    assert confine_image_path(root, str(root / "b.png")) == root / "b.png"
    assert confine_image_path(root, "../b.png", relative_to=root / "splits") == root / "b.png"
    with pytest.raises(DataError, match="leaves the data root"):
        confine_image_path(root, f"{root}-other/b.png")


def test_an_image_that_cannot_be_opened_is_named_with_the_remedy(tiny_folder: Path, tmp_path: Path) -> None:
    whole = noise_picture(tmp_path / "whole.png", 64, 64).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    write_picture(tmp_path / "thin.png", width=600, height=1)
    processor = ImageProcessor(tiny_folder, tmp_path)

    with pytest.raises(DataError, match=r"image .*gone\.png: does not exist; check the path"):
        processor.load("gone.png")
    for name in ("half.png", "text.png"):
        with pytest.raises(DataError, match=rf"image .*{name}: cannot be opened .*replace the file"):
            processor.load(name)
    with pytest.raises(DataError, match=r"image .*thin\.png: .*aspect ratio"):
        processor.load("thin.png")
    with pytest.raises(DataError, match="600x1 pixels: .*aspect ratio"):
        processor.grid_for_size(600, 1)


def test_the_fingerprint_changes_with_settings_that_change_pixels_and_with_no_other(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    first = ImageProcessor(tiny_folder, tmp_path)
    file = folder / "preprocessor_config.json"

    def fingerprint_with(**changes: object) -> str:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return ImageProcessor(folder, tmp_path / "elsewhere").fingerprint

    assert len(first.fingerprint) == 16
    assert fingerprint_with() == first.fingerprint
    assert fingerprint_with(processor_class="Other") == first.fingerprint
    assert fingerprint_with(image_mean=[0.4, 0.5, 0.5]) != first.fingerprint
    assert ImageProcessor(tiny_folder, tmp_path, max_pixels=20_000).fingerprint != first.fingerprint


def test_decoded_pixels_are_kept_within_the_byte_budget_least_recent_out_first(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", width=128, height=128)
    one_image_bytes = 64 * 1536 * 4
    processor = ImageProcessor(tiny_folder, tmp_path, cache_bytes=2 * one_image_bytes)

    first_a = processor.load("a.png")[0]
    first_b = processor.load("b.png")[0]
    assert processor.load("a.png")[0] is first_a
    processor.load("c.png")

    assert processor.load("a.png")[0] is first_a
    assert processor.load("b.png")[0] is not first_b
    uncached = ImageProcessor(tiny_folder, tmp_path, cache_bytes=0)
    assert uncached.load("a.png")[0] is not uncached.load("a.png")[0]


def test_a_folder_without_processor_and_impossible_bounds_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no preprocessor_config\.json"):
        ImageProcessor(tmp_path, tmp_path)
    with pytest.raises(DataError, match="got min_pixels 900 and max_pixels 100, expected 1 <="):
        ImageProcessor(tiny_folder, tmp_path, min_pixels=900, max_pixels=100)


def test_importing_the_sample_format_loads_neither_torch_nor_transformers_nor_pil() -> None:
    modules = ("dataset", "images", "model_folder", "polygon", "prompt")
    imports = "; ".join(f"import broker_schemas.method.{name}" for name in modules)
    check = "sys.exit(' '.join({'torch', 'transformers', 'PIL', 'redis'} & sys.modules.keys()) or 0)"

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; {check}"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
