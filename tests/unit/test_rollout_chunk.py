"""What `up` and every role refuse of servers and ranks, and what requests are cut by at run time [S-4]."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from broker_schemas.errors import ConfigError
from rollstream.wiring import dispatch, vllm
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
