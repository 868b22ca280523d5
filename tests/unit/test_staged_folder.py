"""A staged folder appears whole or not at all, and replaces only what its own maker made."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_schemas.errors import DataError
from rollstream.staged_folder import check_replaceable, made_by, staged_folder
from tests.builders.datasets import tree_bytes


def make(folder: Path, text: str, maker: str = "data scenes") -> None:
    with staged_folder(folder, maker, {"seed": 1}) as staging:
        (staging / "a.txt").write_text(text)


def make_half(folder: Path) -> None:
    with staged_folder(folder, "data scenes", {}) as staging:
        (staging / "a.txt").write_text("half")
        raise OSError("disk full")


def test_the_folder_appears_with_a_marker_and_nothing_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "new" / "data", "x")

    assert sorted(tree_bytes(tmp_path)) == ["new/data/a.txt", "new/data/made_by_rollstream.json"]
    assert made_by(tmp_path / "new" / "data") == "data scenes"


def test_the_same_maker_replaces_its_folder_and_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "data", "old")
    (tmp_path / "data" / "stale.txt").write_text("stale")

    make(tmp_path / "data", "new")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert sorted(tree_bytes(tmp_path / "data")) == ["a.txt", "made_by_rollstream.json"]
    assert (tmp_path / "data" / "a.txt").read_text() == "new"


def test_an_error_inside_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    make(tmp_path / "data", "old")
    before = tree_bytes(tmp_path)

    with pytest.raises(OSError, match="disk full"):
        make_half(tmp_path / "data")

    assert tree_bytes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_folder_of_someone_else_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    make(tmp_path / "model", "x", maker="model tiny")
    (tmp_path / "empty").mkdir()

    for name in ("mine", "file", "model"):
        with pytest.raises(DataError, match=f"{name}: .*expected a new folder.*choose another folder"):
            make(tmp_path / name, "x")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    make(tmp_path / "empty", "x")
    check_replaceable(tmp_path / "absent", "data scenes")


def test_every_user_may_read_what_it_made(tmp_path: Path) -> None:
    # weights are written for their owner alone by some writers, and containers read them as another user
    with staged_folder(tmp_path / "model", "model tiny", {}) as staging:
        (staging / "parts").mkdir()
        for name in ("model.safetensors", "parts/0"):
            (staging / name).write_text("weights")
            (staging / name).chmod(0o600)

    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {0o644}
