"""The backend over servers in memory: slices, order, seeds, batch sizes, versions."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import ServerFailed, ServerUnavailable
from broker_schemas.method.dataset import Sample
from broker_schemas.rollout_servers.server_slots import unshared_slots
from producers.vllm_backend import VllmBackend
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from tests.builders.settings import decoding_settings, vllm_backend_settings
from tests.builders.vllm_fakes import END_ID, FakeVllm, chat_reply, tokens_reply

POLICY = PublishedPolicy(policy_version=3, optimizer_step=3, weights_path="/p/v3", published_at_ms=0)


class Prompts:
    """Prompts of five tokens; an image is one token more."""

    end_token_id = END_ID

    class tokenizer:
        @staticmethod
        def encode(text: str, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"ids": [1, 607, 2]})

    def build_text(self, num_images: int = 1) -> str:
        return "prompt"

    def build_ids(self, grids_thw: Any) -> Any:
        return np.asarray([1, 607, 607, 2], np.int32)

    def messages(self, num_images: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image"}] * num_images}]


class Images:
    fingerprint = "f"

    def resized(self, path: str) -> Any:
        return Image.new("RGB", (64, 32), (int(path), 0, 0)), (1, 2, 4)


def sample(number: int) -> Sample:
    return Sample(
        sample_id=str(number),
        task="bbox",
        image_paths=(str(number),),
        image_files=(Path(str(number)),),
        width=64,
        height=32,
        objects=(),
    )


def echo(body: dict[str, Any], version: str = "3:/p/v3") -> dict[str, Any]:
    """Answer with the seed and the red of the image, so that order and place can be seen."""
    url = body["content_parts"][0]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    red = picture.getpixel((0, 0))[0]  # type: ignore[index]
    return tokens_reply([1, 607, 607, 2], [body["sampling_params"]["seed"], red, END_ID], version)


def backend_of(servers: list[FakeVllm], *, decode_batch_size: int = 4) -> VllmBackend:
    fleet = ServerFleet(doors=[server.door() for server in servers], startup_timeout_s=1.0)
    settings = vllm_backend_settings(
        decoding=decoding_settings(max_new_tokens=8),
        decode_batch_size=decode_batch_size,
        retry=RetrySettings(request_timeout_s=5.0),
    )
    return VllmBackend(Prompts(), Images(), fleet, settings, unshared_slots)  # type: ignore[arg-type]


def servers_of(*world_sizes: int) -> list[FakeVllm]:
    made = [
        FakeVllm(f"http://server{place}:8000", label="3:/p/v3", world_size=size)
        for place, size in enumerate(world_sizes)
    ]
    for server in made:
        server.answer = echo
    return made


def counted(server: FakeVllm) -> list[int]:
    """Seeds that the server was asked for, in order of arrival."""
    seen: list[int] = []
    answer = server.answer

    def note(body: dict[str, Any]) -> dict[str, Any]:
        seen.append(body["sampling_params"]["seed"])
        return answer(body)

    server.answer = note
    return seen


@pytest.mark.req("V-1", "V-4", "S-4")
def test_rollouts_are_divided_by_world_size_and_come_back_in_order_with_their_seeds() -> None:
    servers = servers_of(1, 3)
    seen = [counted(server) for server in servers]
    backend = backend_of(servers)
    backend.follow(POLICY)

    generations = backend.generate([sample(n) for n in range(8)], range(100, 108))

    assert [item.response_token_ids.tolist() for item in generations] == [
        [100 + n, n, END_ID] for n in range(8)
    ]
    assert [sorted(seeds) for seeds in seen] == [[100, 101], list(range(102, 108))]
    assert backend.policy_version == 3


@pytest.mark.req("S-3")
def test_no_more_rollouts_than_the_batch_size_are_in_flight_on_one_gpu() -> None:
    servers = servers_of(1)
    seen = counted(servers[0])
    backend = backend_of(servers, decode_batch_size=2)
    backend.follow(POLICY)

    backend.generate([sample(n) for n in range(6)], range(6))

    assert [sorted(seen[start : start + 2]) for start in (0, 2, 4)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.req("V-4")
def test_half_a_batch_that_fails_is_sent_again_and_the_order_stays() -> None:
    servers = servers_of(1)
    failed: set[bytes] = set()

    def fail_once(request: httpx.Request) -> httpx.Response | None:
        is_generation = request.method == "POST" and request.url.path == "/inference/v1/generate"
        if is_generation and len(failed) < 3 and request.content not in failed:
            failed.add(request.content)
            return httpx.Response(500, json={"error": {"message": "EngineCore encountered an issue"}})
        return None

    servers[0].faults.append(fail_once)
    backend = backend_of(servers, decode_batch_size=8)
    backend.follow(POLICY)

    generations = backend.generate([sample(n) for n in range(6)], range(6))

    assert [item.response_token_ids[1] for item in generations] == list(range(6))
    assert len(failed) == 3


@pytest.mark.req("V-4")
def test_a_server_that_is_lost_while_it_generates_fails_the_call_and_is_left_out_of_the_next() -> None:
    servers = servers_of(1, 1)
    backend = backend_of(servers)
    backend.follow(POLICY)
    servers[0].is_up = False

    with pytest.raises(ServerUnavailable):
        backend.generate([sample(n) for n in range(4)], range(4))
    backend.follow(POLICY)

    assert len(backend.generate([sample(n) for n in range(4)], range(4))) == 4


@pytest.mark.req("V-2")
def test_tokens_of_unpublished_weights_are_refused() -> None:
    servers = servers_of(1)
    servers[0].answer = lambda body: echo(body, "default")
    backend = backend_of(servers)
    backend.follow(POLICY)

    with pytest.raises(ServerFailed, match="'default'"):
        backend.generate([sample(0)], [0])


def test_a_server_without_the_token_endpoint_is_asked_by_chat() -> None:
    servers = servers_of(1)
    servers[0].takes_token_ids = False
    servers[0].answer = lambda body: chat_reply([1, 607, 607, 2], [body["seed"], END_ID])
    backend = backend_of(servers)
    backend.follow(POLICY)

    generation = backend.generate([sample(0)], [41])[0]

    assert generation.response_token_ids.tolist() == [41, END_ID]
    assert generation.policy_version == 3


def test_nothing_is_generated_before_a_policy_is_followed_and_nothing_for_no_samples() -> None:
    backend = backend_of(servers_of(1))

    assert backend.generate([], []) == []
    with pytest.raises(ServerUnavailable, match="follow"):
        backend.generate([sample(0)], [0])
