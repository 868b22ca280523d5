"""The run folder: names, and readers that forgive a writer killed in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_schemas.errors import ConfigError, DataError
from rollstream.run_folder import (
    JsonLinesReader,
    RunFolder,
    config_value,
    latest_steps,
    read_json_lines,
    read_json_map,
    read_resolved_config,
)
from tests.builders.run_folders import make_step


def test_every_name_lies_inside_the_run_folder_and_none_is_used_twice(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")

    names = [getattr(folder, name) for name, kind in vars(RunFolder).items() if isinstance(kind, property)]
    paths = [path for path in names if isinstance(path, Path)]

    assert len(paths) == len(set(paths)) == 22
    assert all(folder.path in path.parents for path in paths)
    assert folder.role_log("producer", 2) == folder.path / "logs/producer-2.log"
    assert folder.policy_version_dir(7) == folder.path / "policy/v7"
    assert folder.evaluation("before").name == "evaluation-before.json"
    assert folder.name == "demo"
    assert not folder.path.exists()


@pytest.mark.parametrize("kind", ["missing", "file", "foreign"])
def test_a_wrong_path_is_one_error_that_names_path_and_remedy(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "file":
        path.write_text("x", encoding="utf-8")
    if kind == "foreign":
        path.mkdir()

    with pytest.raises(ConfigError, match=r"there.*runs/<name>"):
        RunFolder.existing(path)


def test_a_folder_with_any_trace_of_a_run_is_accepted(tmp_path: Path) -> None:
    RunFolder(tmp_path).train_log.write_text("", encoding="utf-8")

    assert RunFolder.existing(tmp_path).path == tmp_path


def test_a_torn_last_line_is_ignored_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3, "b')

    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_torn_line_in_the_middle_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "lo{"a": 2}\n\n[1]\n\xff\n{"a": 3}\n')

    reader = JsonLinesReader(path)

    assert reader.read_new() == [{"a": 1}, {"a": 3}]
    assert reader.num_unreadable == 3


def test_a_reader_returns_each_row_once_whatever_the_pieces_it_arrives_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"row": index, "text": "ä"} for index in range(20)]
    raw = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    reader = JsonLinesReader(path)

    found = reader.read_new()
    with path.open("wb", buffering=0) as stream:
        for start in range(0, len(raw), 7):
            stream.write(raw[start : start + 7])
            found += reader.read_new()

    assert found == rows
    assert reader.num_unreadable == 0
    assert reader.read_new() == []


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    reader = JsonLinesReader(path)
    reader.read_new()

    path.write_bytes(b'{"a": 9}\n')

    assert reader.read_new() == [{"a": 9}]


def test_after_a_resume_the_last_row_of_a_step_counts_and_lost_steps_are_gone() -> None:
    before = [make_step(step, loss=1.0) for step in range(6)]
    resumed = [make_step(step, loss=2.0) for step in (3, 4)]

    rows = latest_steps([*before, *resumed, {"loss": 3.0}])

    assert [(row["optimizer_step"], row["loss"]) for row in rows] == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]


def test_broken_json_and_yaml_are_errors_that_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-x.json"
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluation-x\.json"):
        read_json_map(path)

    config = tmp_path / "resolved.yaml"
    for broken in ("a: [1", "- 1\n"):
        config.write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=r"resolved\.yaml"):
            read_resolved_config(config)


def test_missing_files_are_nothing_rather_than_errors(tmp_path: Path) -> None:
    assert read_json_map(tmp_path / "audit.json") is None
    assert read_resolved_config(tmp_path / "resolved.yaml") == {}
    assert RunFolder(tmp_path).evaluations() == ()


def test_a_nested_config_value_falls_back_where_a_level_is_no_map() -> None:
    config = {"a": {"b": 3}, "c": 4}

    assert config_value(config, "a", "b") == 3
    assert config_value(config, "c", "b", default="none") == "none"
    assert config_value(config, "x") is None
