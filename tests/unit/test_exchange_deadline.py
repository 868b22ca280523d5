"""A rollout server that drips, or talks without end, is left at the deadline of the whole exchange."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from broker_schemas.errors import ServerFailed, ServerUnavailable
from broker_schemas.rollout_servers.vllm_http import VllmServer

LIMIT_S = 0.5


@contextmanager
def a_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the address of a server that answers each connection by ``talk``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    talk(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def drip(text: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        for place in range(len(text)):
            connection.sendall(text[place : place + 1])
            time.sleep(0.05)

    return talk


def endless(piece: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        for _ in range(10_000):
            connection.sendall(piece)
            time.sleep(0.01)

    return talk


@pytest.mark.req("Q-11", "V-4")
@pytest.mark.parametrize(
    "talk",
    [
        drip(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 500),
        drip(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n" + b" " * 900),
        endless(b"HTTP/1.1 102 Processing\r\n\r\n"),
        lambda connection: time.sleep(5),
    ],
    ids=["header drip", "body drip", "endless 102", "silence"],
)
def test_the_deadline_holds_over_the_whole_exchange(talk: Callable[[socket.socket], None]) -> None:
    with a_server(talk) as address:
        server = VllmServer(address, timeout_s=LIMIT_S)
        started_s = time.monotonic()
        with pytest.raises(ServerUnavailable):
            server.get("/health")
        assert time.monotonic() - started_s < LIMIT_S + 2
        server.close()


@pytest.mark.req("Q-11", "V-4")
def test_json_of_any_depth_is_a_failed_reply() -> None:
    deep = b"[" * 200_000
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(deep)
    with a_server(lambda connection: connection.sendall(head + deep)) as address:
        server = VllmServer(address, timeout_s=10)
        with pytest.raises(ServerFailed, match="reply is no JSON"):
            server.get("/health")
        server.close()
