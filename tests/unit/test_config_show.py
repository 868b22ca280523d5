"""Showing a configuration: resolved, with sources, as a schema and as the page of all keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import load_config
from configs.schema_walk import schema_keys
from configs.show import check_files, json_schema, markdown_table, resolved_yaml, sourced_values, with_sources
from tests.builders.configs import PROJECT_ROOT, load_mapping, make_mapping, write_file

SHIPPED = sorted(p for p in (PROJECT_ROOT / "configs").rglob("*.yaml") if p.name != "template.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_resolved_file_loads_to_the_same_configuration(tmp_path: Path, path: Path) -> None:
    config = load_config(path, ["training.adam_epsilon=1e-7"])

    again = load_config(write_file(tmp_path, resolved_yaml(config)))

    assert again.model_dump() == config.model_dump()
    assert resolved_yaml(again) == resolved_yaml(config)


@pytest.mark.req("S-1")
@pytest.mark.parametrize("ratio", ["0.29", "0.000000000000000001", "0", "1.000"])
def test_the_resolved_file_keeps_the_exact_b_ratio(tmp_path: Path, ratio: str) -> None:
    config = load_mapping(tmp_path, make_mapping(), f"stage2_ab.schedule.b_ratio={ratio}")

    again = load_config(write_file(tmp_path, resolved_yaml(config)))

    assert str(again.stage2_ab.schedule.b_ratio) == str(config.stage2_ab.schedule.b_ratio)


def test_texts_that_look_like_other_types_survive_resolving(tmp_path: Path) -> None:
    for text in ("1e-3", "true", "null", "~", "line\nbreak", "ünïcode <|im_end|>", "a: b", "#x", "12"):
        config = load_mapping(tmp_path, make_mapping(model__instruction="x"))
        changed = config.model_copy(update={"model": config.model.model_copy(update={"instruction": text})})

        assert load_config(write_file(tmp_path, resolved_yaml(changed))).model.instruction == text


def test_settings_without_effect_are_left_out(tmp_path: Path) -> None:
    resolved = resolved_yaml(load_mapping(tmp_path, make_mapping("rollout_matching_sft")))

    for absent in ("stage2_ab", "queue_limit", "vllm", "augment", "tls"):
        assert absent not in resolved
    assert "stall_timeout_s" in resolved


def test_each_value_is_shown_with_its_source(tmp_path: Path) -> None:
    path = write_file(tmp_path, make_mapping())
    config = load_config(path, ["training.max_steps=7"])

    sources = {value.key: (value.value, value.source) for value in sourced_values(config)}

    assert sources["training.max_steps"] == ("7", "override training.max_steps")
    assert sources["run.name"] == ("test", f"{path}:2")
    assert sources["training.packing_buffer"] == ("512", "default")
    assert sources["stage2_ab.schedule.b_ratio"][0] == "0.5"
    assert f"run.name: test  # {path}:2" in [
        " ".join(x.split()).replace(" # ", "  # ") for x in with_sources(config).splitlines()
    ]


def test_check_files_reports_each_file_by_itself(tmp_path: Path) -> None:
    good = write_file(tmp_path, make_mapping(), "good.yaml")
    bad = write_file(tmp_path, make_mapping(run__seed=-1), "bad.yaml")

    reports = check_files([good, bad, tmp_path / "none.yaml"])

    assert [report.is_ok for report in reports] == [True, False, False]
    assert reports[1].problems[0].startswith(f"{bad}:3: run.seed: got -1")
    assert "no such file" in reports[2].problems[0]


def test_check_files_takes_overrides_as_the_commands_that_run_them_do(tmp_path: Path) -> None:
    good = write_file(tmp_path, make_mapping(), "good.yaml")

    (report,) = check_files([good], ["run.seed=-1"])

    assert "run.seed: got -1" in report.problems[0]
    assert check_files([good], ["run.seed=1"])[0].is_ok


def test_every_key_has_a_description_of_one_line() -> None:
    for key in schema_keys():
        if key.section is None:
            description = key.info.description
            assert description, key.name
            assert "\n" not in description, key.name


def test_every_section_has_a_docstring() -> None:
    for key in schema_keys():
        if key.section is not None:
            assert key.section.__doc__, key.name


def test_the_json_schema_describes_every_key_and_is_json() -> None:
    schema: dict[str, Any] = json.loads(json.dumps(json_schema()))

    assert schema["additionalProperties"] is False
    assert "extends" in schema["properties"]
    described = {name for part in schema["$defs"].values() for name in part["properties"]}
    assert {key.path[-1] for key in schema_keys() if len(key.path) > 1} <= described


def test_the_page_of_all_keys_is_the_one_in_docs() -> None:
    page = (PROJECT_ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")

    assert page == markdown_table(), "write docs/CONFIG.md again from configs.show.markdown_table()"


def test_the_page_names_every_key() -> None:
    page = markdown_table()

    for key in schema_keys():
        if key.section is None:
            assert f"| `{key.name}` |" in page
