"""A deadline over a whole HTTP exchange: httpx bounds each read, and a server that drips outlasts that."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx


class ExchangeDeadline:
    """When the exchange of the calling thread must be over; each thread has its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    @contextmanager
    def within(self, limit_s: float) -> Iterator[None]:
        """Let every wait inside end ``limit_s`` seconds from now."""
        self._of_thread.give_up_at = time.monotonic() + limit_s
        try:
            yield
        finally:
            self._of_thread.give_up_at = None

    def left(self, timeout_s: float | None) -> float | None:
        """Return ``timeout_s`` or what is left, the shorter; raises httpcore.ReadTimeout for nothing left."""
        give_up_at: float | None = getattr(self._of_thread, "give_up_at", None)
        if give_up_at is None:
            return timeout_s
        left_s = give_up_at - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("the exchange as a whole took too long")
        return left_s if timeout_s is None else min(timeout_s, left_s)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: ExchangeDeadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return _Stream(inner, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, deadline: ExchangeDeadline) -> None:
        self._inner = httpcore.SyncBackend()
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left_s = self._deadline.left(timeout)
        stream = self._inner.connect_tcp(host, port, left_s, local_address, socket_options)
        return _Stream(stream, self._deadline)


def deadline_transport(deadline: ExchangeDeadline, limits: httpx.Limits) -> httpx.HTTPTransport:
    """Return a transport whose reads and writes all end with the thread's ``deadline``.

    A proxy of the environment is not asked: it knows nothing of servers beside us.
    """
    transport = httpx.HTTPTransport(limits=limits, trust_env=False)
    # httpx takes no backend of its own, its pool does
    transport._pool._network_backend = _Backend(deadline)
    return transport
