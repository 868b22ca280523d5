"""The HTTP door: every way a server can fail to answer becomes one of our errors, within its deadline."""

from __future__ import annotations

import inspect

import httpx
import pytest

from broker_schemas.errors import RolloutServerError, ServerFailed, ServerRefused, ServerUnavailable
from broker_schemas.rollout_servers.vllm_http import MAX_REPLY_BYTES, VllmServer, server_errors
from tests.builders.vllm_fakes import FakeVllm


def answering(response: httpx.Response) -> FakeVllm:
    server = FakeVllm()
    server.faults.append(lambda request: response)
    return server


def httpx_errors() -> list[type[Exception]]:
    found = [value for _, value in inspect.getmembers(httpx, inspect.isclass)]
    roots = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError)
    return [value for value in found if issubclass(value, roots)]


@pytest.mark.req("V-4")
@pytest.mark.parametrize("kind", httpx_errors())
def test_every_error_of_the_http_library_becomes_ours(kind: type[Exception]) -> None:
    if issubclass(kind, httpx.HTTPStatusError):
        request = httpx.Request("GET", "http://one")
        error: Exception = kind("boom", request=request, response=httpx.Response(500))  # type: ignore[call-arg]
    else:
        error = kind() if kind in (httpx.StreamConsumed, httpx.ResponseNotRead) else _make(kind)

    with pytest.raises(RolloutServerError, match="GET one"), server_errors("GET one"):
        raise error


def _make(kind: type[Exception]) -> Exception:
    try:
        return kind("boom")
    except TypeError:
        return kind()


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut off")]
)
def test_a_lost_connection_and_a_late_answer_make_the_server_unavailable(error: Exception) -> None:
    server = FakeVllm()

    def fail(request: httpx.Request) -> None:
        raise error

    server.faults.append(fail)

    with pytest.raises(ServerUnavailable, match="GET http://one:8000/weight_info"):
        server.door().label()
    assert not server.door().is_healthy()


@pytest.mark.parametrize(
    "status, expected",
    [
        (500, ServerFailed),
        (503, ServerFailed),
        (429, ServerFailed),
        (400, ServerRefused),
        (404, ServerRefused),
    ],
)
def test_a_status_says_whether_another_attempt_may_help(
    status: int, expected: type[RolloutServerError]
) -> None:
    server = answering(httpx.Response(status, json={"error": {"message": "EngineCore encountered an issue"}}))

    with pytest.raises(expected, match=f"status {status} .*EngineCore"):
        server.door().post("/resume")


@pytest.mark.parametrize("raw", [b"{", b"<html>", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_a_reply_that_is_no_json_object_is_a_failure(raw: bytes) -> None:
    with pytest.raises(ServerFailed, match="JSON"):
        answering(httpx.Response(200, content=raw)).door().get("/weight_info")


def test_a_reply_that_never_ends_is_cut_off_at_the_deadline() -> None:
    class Drip(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]
            while True:
                yield b" "

    server = answering(httpx.Response(200, stream=Drip()))

    with pytest.raises(ServerUnavailable, match=r"not complete after 0\.05 s"):
        VllmServer("http://one", timeout_s=0.05, transport=httpx.MockTransport(server.handle)).get("/health")


def test_a_reply_of_any_size_is_not_read_into_memory() -> None:
    class Flood(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]
            piece = b" " * (64 * 1024 * 1024)
            while True:
                yield piece

    server = answering(httpx.Response(200, stream=Flood()))

    with pytest.raises(ServerFailed, match=str(MAX_REPLY_BYTES)):
        server.door(timeout_s=60).get("/health")


@pytest.mark.parametrize("value", [0, -1, None, "8", True, 1.5])
def test_a_world_size_that_is_none_is_refused(value: object) -> None:
    server = answering(httpx.Response(200, json={"world_size": value}))

    with pytest.raises(ServerFailed, match="world_size"):
        server.door().world_size()


def test_a_server_without_a_model_is_noticed() -> None:
    with pytest.raises(ServerFailed, match="no model"):
        answering(httpx.Response(200, json={"data": []})).door().model()


@pytest.mark.parametrize("is_on", [True, False])
def test_the_token_endpoint_is_recognised(is_on: bool) -> None:
    server = FakeVllm()
    server.takes_token_ids = is_on

    assert server.door().takes_token_ids() is is_on


@pytest.mark.req("V-2")
def test_a_label_that_does_not_read_back_is_a_failure() -> None:
    server = FakeVllm()
    server.faults.append(
        lambda request: (
            httpx.Response(200, json={"weight_version": "other"})
            if request.url.path == "/weight_info"
            else None
        )
    )

    with pytest.raises(ServerFailed, match="'other' after it was set to '3:/p/v3'"):
        server.door().set_label("3:/p/v3")


@pytest.mark.req("V-2")
def test_a_server_that_does_not_see_the_folder_says_so_and_is_refused() -> None:
    server = FakeVllm()
    server.load_problem = "no *.safetensors in /p/v3 as this server sees it"

    with pytest.raises(ServerRefused, match=r"no \*\.safetensors in /p/v3"):
        server.door().load_weights("/p/v3")


@pytest.mark.req("V-2")
def test_a_cpu_server_without_our_loader_is_refused_and_a_gpu_server_uses_its_own() -> None:
    server = FakeVllm()
    server.loader = ""
    with pytest.raises(ServerRefused, match="rollstream serve vllm"):
        server.door().load_weights("/p/v3")

    server.device = "cuda"
    server.door().load_weights("/p/v3")

    assert server.log == ["/collective_rpc reload_weights /p/v3"]


@pytest.mark.req("V-2")
def test_old_keys_and_values_that_cannot_be_cleared_are_a_failure() -> None:
    server = FakeVllm()
    server.faults.append(
        lambda request: (
            httpx.Response(200, json={"success": False})
            if request.url.path == "/reset_prefix_cache"
            else None
        )
    )

    with pytest.raises(ServerFailed, match="could not be cleared"):
        server.door().forget_old_weights()
