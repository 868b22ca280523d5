"""L-6: what a folder of weights says of images is what training did, in every form of a processor's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import DataError
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.processor_file import ImageBounds, write_image_bounds
from learner.trained_weights import TrainedWeights
from learner.weights import publish_weights
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.learner_runs import companions_of
from tests.builders.learners import tiny_model

OWN = {"shortest_edge": 3136, "longest_edge": 12544}
FORMS: dict[str, dict[str, Any]] = {
    "size": {"size": OWN},
    "names of their own": {"min_pixels": 3136, "max_pixels": 12544},
    "names beside another size": {"size": {"shortest_edge": 1, "longest_edge": 2}}
    | {"min_pixels": 3136, "max_pixels": 12544},
}


def folder_with(folder: Path, tiny_folder: Path, form: dict[str, Any]) -> Path:
    shutil.copytree(tiny_folder, folder)
    path = folder / "preprocessor_config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "size"}
    path.write_text(json.dumps(content | form))
    return folder


@pytest.mark.req("L-6")
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("bounds", [(4096, 16384), (None, 16384), (4096, None), (None, None)])
def test_other_programs_resize_as_the_run_did(
    tiny_folder: Path, tmp_path: Path, form: str, bounds: tuple[int | None, int | None]
) -> None:
    folder = folder_with(tmp_path / "model", tiny_folder, FORMS[form])
    least, most = bounds
    expected = ImageProcessor(folder, tmp_path, min_pixels=least, max_pixels=most)
    grid = ImageGrid.of_model(folder, min_pixels=least, max_pixels=most)
    write_image_bounds(folder, ImageBounds(min_pixels=least, max_pixels=most))
    assert ImageProcessor(folder, tmp_path).fingerprint == expected.fingerprint
    assert ImageGrid.of_model(folder) == grid
    assert (grid.min_pixels, grid.max_pixels) == (least or 3136, most or 12544)


@pytest.mark.req("L-6")
def test_a_joint_file_that_stands_above_the_images_own_gets_the_bounds_too(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "model", tiny_folder, FORMS["size"])
    own = json.loads((folder / "preprocessor_config.json").read_text())
    joint = folder / "processor_config.json"
    joint.write_text(json.dumps({"processor_class": "Qwen3VLProcessor", "image_processor": own}))
    write_image_bounds(folder, ImageBounds(min_pixels=4096, max_pixels=16384))
    assert json.loads(joint.read_text())["processor_class"] == "Qwen3VLProcessor"
    expected = ImageProcessor(tiny_folder, tmp_path, min_pixels=4096, max_pixels=16384)
    assert ImageProcessor(folder, tmp_path).fingerprint == expected.fingerprint
    (folder / "preprocessor_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"preprocessor_config\.json: not an image processor file"):
        write_image_bounds(folder, ImageBounds(min_pixels=4096, max_pixels=None))


@pytest.mark.req("L-6", "L-7")
def test_a_published_policy_has_the_bounds_of_the_run_in_its_processor_file(
    tiny_folder: Path, tmp_path: Path
) -> None:
    before = (tiny_folder / "preprocessor_config.json").read_bytes()
    path = publish_weights(
        tmp_path / "policy",
        trained=TrainedWeights(tiny_model()),
        policy_version=0,
        companions=companions_of(tiny_folder, min_pixels=4096, max_pixels=8192),
        num_kept=1,
    )
    size = json.loads((path / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 4096, "longest_edge": 8192}
    assert (tiny_folder / "preprocessor_config.json").read_bytes() == before


@pytest.mark.req("L-6")
def test_the_learner_is_given_the_bounds_of_the_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    from rollstream.wiring.access import companions

    mapping = make_mapping()
    mapping["model"] = {"name_or_path": str(tiny_folder), "image": {"max_pixels": 8192}}
    given = companions(load_mapping(tmp_path, mapping))
    assert (given.folder, given.bounds) == (tiny_folder, ImageBounds(min_pixels=None, max_pixels=8192))


def test_json_of_any_depth_is_a_broken_file(tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")

    with pytest.raises(DataError, match="preprocessor_config.json"):
        ImageGrid.of_model(tmp_path)
    with pytest.raises(DataError, match="preprocessor_config.json"):
        write_image_bounds(tmp_path, ImageBounds(min_pixels=1, max_pixels=2))
