"""What `up` and every role refuse of servers and ranks, and what requests are cut by at run time [S-4]."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import ConfigError
from rollstream.wiring import dispatch, vllm
from tests.builders.configs import METHOD, load_mapping, make_mapping, put, refusal
from tests.builders.vllm_fakes import FakeVllm


def a_config(*, decode: int, num_ranks: int, request_size: int | None = None) -> Any:
    def part(**values: Any) -> Any:
        return type("Part", (), values)()

    return part(
        b_ratio=1,
        learner_world_size=num_ranks,
        producers=part(request_size=request_size),
        rollout_matching=part(
            rollout_backend="vllm", decode_batch_size=decode, vllm=part(server=part(timeout_s=0.0))
        ),
    )


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[FakeVllm]:
    found = [FakeVllm("http://one:8000", world_size=1), FakeVllm("http://two:8000", world_size=2)]
    monkeypatch.setattr(vllm, "server_doors", lambda config: [server.door() for server in found])
    return found


@pytest.mark.req("S-4")
def test_requests_are_cut_by_the_chunk_of_the_servers_and_the_log_says_so(
    servers: list[FakeVllm], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rollstream.wiring")

    assert dispatch.request_size(a_config(decode=4, num_ranks=2)) == 6  # floor(4 x 3 / 2)
    assert "rollout chunk: 6 (decode_batch_size 4, world sizes [1, 2], W 2)" in caplog.text
    assert dispatch.request_size(a_config(decode=4, num_ranks=2, request_size=5)) == 5


@pytest.mark.req("S-4")
def test_a_request_larger_than_the_chunk_is_refused_with_what_to_do(servers: list[FakeVllm]) -> None:
    with pytest.raises(ConfigError, match="request_size: got 64, expected at most the chunk of 2 .*unset"):
        dispatch.request_size(a_config(decode=2, num_ranks=3, request_size=64))


@pytest.mark.req("S-4")
def test_servers_that_cannot_give_every_rank_one_are_refused(servers: list[FakeVllm]) -> None:
    servers[1].is_up = False
    with pytest.raises(ConfigError, match="decode_batch_size 1 on servers with world sizes .1. gives 1"):
        vllm.rollout_chunk(a_config(decode=1, num_ranks=4), wait_s=0.0)


@pytest.mark.req("S-4")
def test_without_a_server_that_answers_nothing_is_known_yet(servers: list[FakeVllm]) -> None:
    for server in servers:
        server.is_up = False
    assert vllm.rollout_chunk(a_config(decode=1, num_ranks=4), wait_s=0.0) is None
    assert dispatch.request_size(a_config(decode=1, num_ranks=4)) == dispatch.DEFAULT_REQUEST_SIZE


def a_mapping(*, urls: list[str], decode: int, num_ranks: int, gpus: list[int]) -> dict[str, Any]:
    devices = {"learner_world_size": num_ranks, "rollout_gpus": gpus}
    mapping = make_mapping("stage2_async", devices=devices)
    mapping["training"]["effective_batch_size"] = 16
    put(mapping, f"{METHOD}.rollout_backend", "vllm")
    put(mapping, f"{METHOD}.vllm.server.servers", [{"base_url": url} for url in urls])
    put(mapping, f"{METHOD}.decode_batch_size", decode)
    return mapping


HERE = ["http://127.0.0.1:8000", "http://localhost:8001", "http://gpu-box:8000"]


@pytest.mark.req("S-4")
@pytest.mark.parametrize("urls, decode, gpus", [(HERE[:1], 1, []), (HERE[:2], 1, [0, 1]), (HERE[1:2], 3, [])])
def test_the_configuration_alone_refuses_servers_that_cannot_give_every_rank_one(
    tmp_path: Path, urls: list[str], decode: int, gpus: list[int]
) -> None:
    said = refusal(tmp_path, a_mapping(urls=urls, decode=decode, num_ranks=4, gpus=gpus))
    assert f"{METHOD}.decode_batch_size" in said
    assert "devices.rollout_gpus" in said
    assert "expected at least one for each of 4 learner ranks" in said


@pytest.mark.req("S-4")
@pytest.mark.parametrize(
    "urls, decode, gpus",
    [(HERE[:1], 4, []), (HERE[:1], 1, [0, 1, 2, 3]), (HERE[:2], 2, []), (HERE[2:], 1, []), (HERE[1:], 1, [])],
)
def test_servers_that_can_and_servers_elsewhere_load(
    tmp_path: Path, urls: list[str], decode: int, gpus: list[int]
) -> None:
    mapping = a_mapping(urls=urls, decode=decode, num_ranks=4, gpus=gpus)
    assert len(load_mapping(tmp_path, mapping).rollout_matching.vllm.server.servers) == len(urls)
