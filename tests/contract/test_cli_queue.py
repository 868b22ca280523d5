"""The commands of the queue on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from rollstream.commands.queue import register
from tests.builders.configs import make_mapping, write_file


def make_app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_gc_says_what_it_deleted(tmp_path: Path) -> None:
    run = tmp_path / "alone"
    (run / "redis").mkdir(parents=True)
    write_file(run, make_mapping(run__name="alone"), "resolved.yaml")
    (run / "redis" / "appendonly.aof").write_bytes(b"x" * 10)

    done = CliRunner().invoke(make_app(), ["gc", str(run), "--json"])

    assert (done.exit_code, json.loads(done.stdout)) == (0, {"num_keys": 0, "num_file_bytes": 10})


def test_replay_of_a_run_without_an_archive_says_so(tmp_path: Path) -> None:
    run = tmp_path / "alone"
    run.mkdir()
    write_file(run, make_mapping(run__name="alone"), "resolved.yaml")

    done = CliRunner().invoke(make_app(), ["replay", str(run)])

    assert isinstance(done.exception, DataError)
    with pytest.raises(DataError, match="nothing to replay"):
        raise done.exception
