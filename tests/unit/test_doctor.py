"""The doctor: each thing that is wrong is found, told in one line, and comes with what to change."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.prompt import load_tokenizer
from configs import RunConfig
from rollstream.doctor import examining as doctor
from rollstream.doctor.broker import (
    BrokerFacts,
    examine_broker,
    judge_clock,
    judge_eviction,
    judge_memory,
    judge_persistence,
)
from rollstream.doctor.findings import fail, ok, render_findings
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_lock import StackLock
from rollstream.wiring.access import PORT_OFFSETS
from tests.builders.configs import METHOD, load_mapping, make_mapping, put
from tests.builders.datasets import write_picture
from tests.builders.ports import free_base_port

FACTS = BrokerFacts(
    server="7.2.0",
    is_append_only=True,
    appendfsync="everysec",
    eviction="noeviction",
    memory_limit_bytes=4 << 30,
    used_memory_bytes=1 << 20,
    skew_ms=12,
)


def facts(**changes: Any) -> BrokerFacts:
    return dataclasses.replace(FACTS, **changes)


def config_of(folder: Path, **settings: Any) -> RunConfig:
    """A run in ``folder`` with one sample whose image is there."""
    write_picture(folder / "one.png", 10, 10)
    sample = {
        "images": ["one.png"],
        "width": 10,
        "height": 10,
        "objects": [{"desc": "a", "bbox_2d": [1, 2, 3, 4]}],
    }
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    mapping = make_mapping(
        run__output_dir=str(folder / "runs"),
        data__train_jsonl=str(folder / "train.jsonl"),
        data__val_jsonl=str(folder / "val.jsonl"),
        model__name_or_path=None,
        model__config={},
    )
    for name, value in settings.items():
        put(mapping, name.replace("__", "."), value)
    return load_mapping(folder, mapping)


@pytest.mark.parametrize(
    "finding, verdict",
    [
        (judge_persistence(FACTS, "everysec"), "ok"),
        (judge_persistence(facts(is_append_only=False), "everysec"), "fail"),
        (judge_persistence(facts(is_append_only=False), "none"), "ok"),
        (judge_persistence(FACTS, "always"), "fail"),
        (judge_persistence(facts(appendfsync="always"), "always"), "ok"),
        (judge_persistence(facts(appendfsync=""), "always"), "ok"),
        (judge_eviction(FACTS), "ok"),
        (judge_eviction(facts(eviction="allkeys-lru")), "fail"),
        (judge_memory(FACTS, 1 << 30), "ok"),
        (judge_memory(facts(memory_limit_bytes=0), 1 << 30), "warn"),
        (judge_memory(facts(memory_limit_bytes=1 << 29), 1 << 30), "fail"),
        (judge_memory(facts(used_memory_bytes=3 << 30), 1 << 30), "warn"),
        (judge_clock(FACTS), "ok"),
        (judge_clock(facts(skew_ms=-5_000)), "warn"),
        (judge_clock(facts(skew_ms=60_000)), "fail"),
    ],
)
def test_the_broker_is_judged_by_what_the_run_relies_on(finding: Any, verdict: str) -> None:
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_a_broker_that_is_away_and_a_missing_password_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    away = config_of(tmp_path, broker__url=f"unix://{tmp_path}/nothing.sock")
    monkeypatch.delenv("DOCTOR_TEST_PASSWORD", raising=False)
    keyless = config_of(
        tmp_path, broker__url="redis://127.0.0.1:1/0", broker__password_env="DOCTOR_TEST_PASSWORD"
    )
    # when
    (unreachable,), (nameless,) = examine_broker(away), examine_broker(keyless)
    # then
    assert (unreachable.verdict, nameless.verdict) == ("fail", "fail")
    assert "broker.url" in unreachable.remedy
    assert "DOCTOR_TEST_PASSWORD" in nameless.found


def test_a_real_server_is_asked_about_all_of_it(redis_url: str, tmp_path: Path) -> None:
    # given a server without an append-only file and without maxmemory
    findings = {item.check: item for item in examine_broker(config_of(tmp_path, broker__url=redis_url))}
    # then
    assert {check: item.verdict for check, item in findings.items()} == {
        "broker": "ok",
        "broker persistence": "fail",
        "broker eviction": "ok",
        "broker memory": "warn",
        "broker clock": "ok",
        "broker jobs": "ok",
    }


def test_data_is_read_whole_with_its_images(tmp_path: Path) -> None:
    # given a good training set and a validation set with a missing image
    config = config_of(tmp_path)
    assert [item.verdict for item in doctor.examine_data(config)] == ["ok", "ok"]
    (tmp_path / "one.png").unlink()
    # then
    train, _ = doctor.examine_data(config)
    assert train.verdict == "fail"
    assert "one.png" in train.found
    # and a line that is none, and no file at all
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "val.jsonl").unlink()
    broken, absent = doctor.examine_data(config)
    assert "train.jsonl:1" in broken.found
    assert "rollstream data" in absent.remedy


def test_a_model_that_is_not_there_is_found(tmp_path: Path) -> None:
    config = config_of(tmp_path, model__config=None, model__name_or_path=str(tmp_path / "nothing"))
    (finding,) = doctor.examine_model(config)
    assert finding.verdict == "fail"
    assert "model.name_or_path" in finding.remedy


@pytest.mark.req("M-7")
def test_the_model_is_told_with_the_tokens_that_decide_whether_an_answer_goes_on(tmp_path: Path) -> None:
    # given the shipped checkpoint and a tokenizer that truncates
    shipped = SHIPPED_MODEL
    config = config_of(tmp_path, model__config=None, model__name_or_path=str(shipped))
    model, join = doctor.examine_model(config)
    assert (model.verdict, join.verdict, join.check) == ("ok", "ok", "tokens at the join")
    assert "goes on with" in join.found
    broken = load_tokenizer(shipped)
    broken.enable_truncation(8)
    finding = doctor.judge_join(broken, CoordVocabulary.from_token_to_id(broken.token_to_id))
    assert finding.verdict == "fail"
    assert "does not give back" in finding.found


def test_a_disk_too_small_for_the_checkpoints_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given weights of 10 GB by their directory entry
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (model / name).write_text("{}")
    with (model / "model.safetensors").open("wb") as weights:
        weights.truncate(10 * 10**9)
    config = config_of(tmp_path, model__config=None, model__name_or_path=str(model))
    free: dict[str, int] = {}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free["bytes"]}))
    # then
    verdicts = []
    for num_bytes in (10**12, 300 * 10**9, 100 * 10**9):
        free["bytes"] = num_bytes
        verdicts.append(next(iter(doctor.examine_disk(config))).verdict)
    assert verdicts == ["ok", "warn", "fail"]


def config_with_only_the_packers_port_taken(folder: Path, taken: socket.socket) -> RunConfig:
    """Listen with ``taken``; other programs of this machine may hold neighbouring ports, so look for room."""
    for _ in range(100):
        base_port = free_base_port(PORT_OFFSETS.values())
        config = config_of(folder, metrics__base_port=base_port)
        try:
            taken.bind(("127.0.0.1", base_port + PORT_OFFSETS["pack"]))
        except OSError:  # somebody was quicker
            continue
        taken.listen()
        return config
    raise AssertionError("no free range of ports on this machine")


def test_a_port_in_use_is_found_unless_the_runs_own_stack_uses_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        # given somebody on the packer's port, and nobody on those of the other roles
        config = config_with_only_the_packers_port_taken(tmp_path, taken)
        # then
        (finding,) = doctor.examine_ports(config)
        assert finding.verdict == "fail"
        assert "packer" in finding.found
        # and when that is our own stack
        folder = tmp_path / "runs" / "test"
        folder.mkdir(parents=True)
        lock = StackLock.acquire(folder)
        assert [item.verdict for item in doctor.examine_ports(config)] == ["ok"]
        lock.release()
    # and no endpoints are a warning
    assert [item.verdict for item in doctor.examine_ports(config_of(tmp_path))] == ["warn"]


@pytest.mark.req("V-7")
def test_gpus_that_are_not_there_are_found(tmp_path: Path) -> None:
    config = config_of(tmp_path, devices__rollout_gpus=[0], devices__learner_gpus=[1, 2])
    assert doctor.judge_gpus(config, 3).verdict == "ok"
    finding = doctor.judge_gpus(config, 2)
    assert finding.verdict == "fail"
    assert finding.found.startswith("2 named")


@pytest.mark.req("S-4")
def test_rollout_servers_are_asked_and_their_sizes_checked(tmp_path: Path) -> None:
    # given a server that is not there
    settings = {
        f"{METHOD}.rollout_backend".replace(".", "__"): "vllm",
        f"{METHOD}.vllm.server.servers".replace(".", "__"): [{"base_url": "http://127.0.0.1:9"}],
        f"{METHOD}.decode_batch_size".replace(".", "__"): 2,
    }
    config = config_of(tmp_path, **settings)
    (finding,) = doctor.examine_servers(config)
    assert finding.verdict == "fail"
    assert "rollstream serve vllm" in finding.remedy
    # and sizes that feed both ranks, or not
    assert doctor.judge_chunk(config, [1]).verdict == "ok"
    elsewhere = {  # a server of this machine would be refused by the configuration
        f"{METHOD}.vllm.server.servers".replace(".", "__"): [{"base_url": "http://gpu-box:8000"}],
        f"{METHOD}.decode_batch_size".replace(".", "__"): 1,
    }
    too_small = config_of(tmp_path, **settings | elsewhere)
    assert doctor.judge_chunk(too_small, [1]).verdict == "fail"


def test_findings_are_readable_at_eighty_columns() -> None:
    # given
    console = Console(width=80, record=True, file=io.StringIO())
    # when
    console.print(render_findings([ok("broker", "version 7"), fail("disk", "x" * 200, "free some")]))
    # then
    lines = console.export_text().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split()[:2] == ["ok", "broker"]
    assert any(line.strip() == "-> free some" for line in lines)
