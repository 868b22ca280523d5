"""Bad input: one clear error that names the thing and the remedy, status not 0, nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import redis_server_program
from tests.e2e.conftest import Program

pytestmark = pytest.mark.timeout(120)


def refuse(program: Program, *changes: str, config: str = "configs/demo.yaml") -> tuple[int, str]:
    """Run ``up`` with a fault; return status and message, and see that no run folder was made."""
    done = program.run("up", config, "--steps", "1", *program.overrides("run.name=bad", *changes))
    assert not (program.workdir / "runs" / "bad").exists()
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.req("S-6")
def test_a_missing_configuration_is_named(program: Program) -> None:
    status, message = refuse(program, config="configs/nowhere.yaml")
    assert status == 2
    assert "configs/nowhere.yaml" in message


@pytest.mark.req("S-6")
def test_an_unknown_key_is_named_with_its_place(program: Program) -> None:
    path = program.workdir / "typo.yaml"
    path.write_text(f"extends: {Path('configs/demo.yaml').resolve()}\ntraining:\n  learnin_rate: 1\n")
    status, message = refuse(program, config=str(path))
    assert status == 2
    assert "training.learnin_rate" in message
    assert "typo.yaml:3" in message
    assert "learning_rate" in message.replace("learnin_rate", "")


def test_a_wrong_data_path_is_named(program: Program) -> None:
    status, message = refuse(program, "data.train_jsonl=nowhere/train.jsonl")
    assert status == 2
    assert "nowhere/train.jsonl" in message
    assert "rollstream data" in message


def test_a_wrong_model_path_is_named(program: Program) -> None:
    status, message = refuse(program, "model.name_or_path=nowhere/model")
    assert status == 2
    assert "nowhere/model" in message


@pytest.fixture
def broken_scenes(program: Program) -> Path:
    folder = program.workdir / "scenes"
    shutil.copytree(program.scenes, folder)
    return folder


@pytest.mark.req("M-11")
def test_a_line_with_a_missing_field_is_named_with_file_line_and_field(
    program: Program, broken_scenes: Path
) -> None:
    train = broken_scenes / "train.jsonl"
    lines = train.read_text().splitlines()
    record = json.loads(lines[2])
    del record["objects"][0]["desc"]
    lines[2] = json.dumps(record)
    train.write_text("\n".join(lines) + "\n")
    status, message = refuse(program, f"data.train_jsonl={train}")
    assert status == 2
    assert "train.jsonl:3" in message
    assert "desc" in message


def test_an_image_that_cannot_be_opened_is_named(program: Program, broken_scenes: Path) -> None:
    record = json.loads((broken_scenes / "train.jsonl").read_text().splitlines()[0])
    image = broken_scenes / record["images"][0]
    image.write_bytes(b"not an image")
    status, message = refuse(program, f"data.train_jsonl={broken_scenes / 'train.jsonl'}")
    assert status == 2
    assert image.name in message


def test_a_port_in_use_is_named(program: Program) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, message = refuse(program, f"metrics.base_port={port}", "metrics.host=127.0.0.1")
    assert status == 2
    assert str(port) in message
    assert "metrics.base_port" in message


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[int]:
    server = redis_server_program()
    assert server is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [server, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", "right-one", "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    yield port
    process.terminate()
    process.wait(timeout=10)


def test_a_refused_password_is_said_without_showing_it(program: Program, guarded_redis: int) -> None:
    program.environment["BROKER_PASSWORD"] = "wrong-one"
    status, message = refuse(
        program,
        f"broker.url=redis://127.0.0.1:{guarded_redis}/0",
        "broker.password_env=BROKER_PASSWORD",
    )
    assert status == 4
    assert "password" in message
    assert "wrong-one" not in message


def test_a_broker_that_is_not_there_is_named(program: Program) -> None:
    status, message = refuse(program, "broker.url=redis://127.0.0.1:1/0")
    assert status == 4
    assert "127.0.0.1:1" in message
