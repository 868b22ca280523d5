"""The shipped files: each loads, each has its own name, and the template asks for every value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from configs import load_config
from configs.schema import AB_VARIANTS
from configs.schema_walk import schema_keys
from configs.show import check_files
from configs.validation import STAND_INS
from tests.builders.configs import METHOD, PROJECT_ROOT

CONFIGS = PROJECT_ROOT / "configs"
TEMPLATE = CONFIGS / "rollout_matching" / "template.yaml"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path != TEMPLATE)
NAMES = [str(path.relative_to(CONFIGS)) for path in SHIPPED]
TEMPLATE_FILLING = {
    "name": "filled",
    "trainer_variant": "rollout_matching_sft",
    "rollout_backend": "vllm",
    "temperature": 0.7,
    "max_new_tokens": 96,
    "post_rollout_pack_scope": "window",
    "debug_dump_parse_failures": True,
    "base_url": "http://127.0.0.1:8000",
    "mode": {"vllm": "server", "sync": "full"},
    "ot_cost": "l1",
    "fallback_to_full": True,
    "train_jsonl": "train.jsonl",
    "val_jsonl": "val.jsonl",
    "name_or_path": "folder",
    "global_max_length": 1024,
    "maskiou_resolution": 64,
    "ot_points": 32,
}


@pytest.mark.req("M-1")
@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_every_shipped_file_loads(path: Path) -> None:
    config = load_config(path)

    assert config.training.effective_batch_size % config.rollouts_per_micro_step == 0


def test_the_expected_files_are_shipped() -> None:
    assert set(NAMES) >= {
        "demo.yaml",
        "bccd.yaml",
        "warm_start/scenes.yaml",
        "warm_start/scenes_settle.yaml",
        "warm_start/bccd.yaml",
        "rollout_matching/micro.yaml",
        "rollout_matching/window.yaml",
        "stage2_ab/step_budgeted.yaml",
        "stage2_async/local.yaml",
        "stage2_async/vllm_local.yaml",
    }


def test_no_two_shipped_files_share_a_run_name() -> None:
    names = [load_config(path).run.name for path in SHIPPED]

    assert len(set(names)) == len(names)


@pytest.mark.req("S-3")
@pytest.mark.parametrize("path", sorted((CONFIGS / "stage2_ab").glob("*.yaml")), ids=lambda path: path.name)
def test_files_of_stage2_ab_decode_four_at_a_time(path: Path) -> None:
    assert load_config(path).rollout_matching.decode_batch_size == 4


@pytest.mark.parametrize("folder", ["rollout_matching", "stage2_ab", "stage2_async"])
def test_a_folder_holds_the_variant_of_its_name(folder: str) -> None:
    for path in SHIPPED:
        if path.parent.name == folder:
            assert load_config(path).variant.startswith(folder)


def test_warm_starts_have_no_rollout_steps() -> None:
    for name in ("scenes.yaml", "bccd.yaml"):
        assert load_config(CONFIGS / "warm_start" / name).b_ratio == 0


@pytest.mark.req("M-1")
def test_the_template_holds_placeholders_only_and_loading_it_lists_each(tmp_path: Path) -> None:
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    placeholders = [number for number, line in enumerate(lines, start=1) if re.search(r": <[^<>]+>$", line)]
    values = [line for line in lines if line and not line.startswith("#") and not line.endswith(":")]
    assert len(values) == len(placeholders)

    (report,) = check_files([TEMPLATE])

    assert not report.is_ok
    assert len(report.problems) == len(placeholders)
    for number, problem in zip(placeholders, report.problems, strict=True):
        assert problem.startswith(f"{TEMPLATE}:{number}: ")
        assert ": fill in the placeholder <" in problem


@pytest.mark.req("M-1")
def test_the_template_names_every_key_of_the_method() -> None:
    (report,) = check_files([TEMPLATE])
    asked = {problem.split(": ")[1].replace("[0]", "") for problem in report.problems}

    method = {key.name for key in schema_keys() if key.name.startswith(METHOD) and key.section is None}

    assert method <= asked


@pytest.mark.req("M-1")
def test_the_template_loads_once_it_is_filled_in(tmp_path: Path) -> None:
    def fill(node: object, name: str, above: str) -> object:
        if isinstance(node, dict):
            return {key: fill(value, key, name) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(item, name, above) for item in node]
        value = TEMPLATE_FILLING.get(name, 1)
        return value[above] if isinstance(value, dict) else value

    filled = tmp_path / "filled.yaml"
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    filled.write_text(yaml.safe_dump(fill(template, "", "")), encoding="utf-8")

    assert load_config(filled).variant not in AB_VARIANTS


def test_one_placeholder_left_over_is_refused_beside_other_problems(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("extends: " + str(CONFIGS / "demo.yaml") + "\nrun: {name: <my-run>, sed: 1}\n")

    (report,) = check_files([path])

    assert [problem.split(": ", 1)[1][:12] for problem in report.problems] == ["run.name: fi", "run.sed: unk"]


def test_every_required_key_has_a_stand_in() -> None:
    required = {key.path for key in schema_keys() if key.info.is_required() and key.section is None}

    assert {path for path in required if "servers" not in path} == set(STAND_INS)
