"""Retry on a new connection, then halves, down to one: what is sent how often, in which order [V-4]."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.errors import PromptMismatch, ServerFailed, ServerUnavailable
from producers.vllm_client import RetrySettings, send_batch


class Line:
    """A server that fails items by how often they came, and batches by how many are under way."""

    def __init__(self, failures: dict[int, int] | None = None) -> None:
        self.failures = dict(failures or {})
        self.sent: Counter[int] = Counter()
        self.num_connections = 1
        self.now_s = 0.0
        self._lock = threading.Lock()

    def send(self, item: int) -> str:
        with self._lock:
            self.sent[item] += 1
            if self.failures.get(item, 0) >= self.sent[item]:
                raise ServerFailed(f"item {item} failed")
        return f"reply {item}"

    def reconnect(self) -> None:
        self.num_connections += 1

    def run(self, num_items: int, **changes: float) -> list[str]:
        retry = RetrySettings(
            request_timeout_s=changes.get("request_timeout_s", 1.0), clock=lambda: self.now_s
        )
        return send_batch(range(num_items), self.send, reconnect=self.reconnect, settings=retry)


def test_a_batch_without_trouble_is_sent_once_on_one_connection() -> None:
    line = Line()

    assert line.run(5) == [f"reply {item}" for item in range(5)]
    assert set(line.sent.values()) == {1}
    assert line.num_connections == 1


def test_nothing_is_sent_for_an_empty_batch() -> None:
    assert Line().run(0) == []


@pytest.mark.req("V-4")
def test_what_failed_alone_is_sent_again_on_a_new_connection() -> None:
    line = Line({2: 1})

    assert line.run(4) == [f"reply {item}" for item in range(4)]
    assert line.sent == {0: 1, 1: 1, 2: 2, 3: 1}
    assert line.num_connections == 2


@pytest.mark.req("V-4")
def test_an_item_that_fails_alone_fails_the_batch_with_its_reason() -> None:
    line = Line({3: 99})

    with pytest.raises(ServerFailed, match="item 3 failed"):
        line.run(8)
    assert line.sent[3] == 2, "a single item is tried, tried again, and given up"


@pytest.mark.req("V-4")
def test_a_batch_that_is_too_large_for_the_server_gets_through_in_halves() -> None:
    line, room = Line(), 2
    lock = threading.Lock()

    def send(item: int) -> str:
        nonlocal room
        with lock:
            room -= 1
            if room < 0:
                raise ServerFailed("out of memory")
        return line.send(item)

    def reconnect() -> None:
        nonlocal room
        line.reconnect()
        room = 2

    retry = RetrySettings(request_timeout_s=1.0, clock=lambda: 0.0)
    replies = send_batch(range(8), send, reconnect=reconnect, settings=retry)

    # two of eight, two of the six left, then the last four in halves
    assert replies == [f"reply {item}" for item in range(8)]
    assert line.num_connections == 4
    assert set(line.sent.values()) == {1}


@pytest.mark.req("V-4", "V-5")
def test_a_refusal_is_not_tried_again() -> None:
    line = Line()

    def send(item: int) -> str:
        line.sent[item] += 1
        raise PromptMismatch("the server saw other tokens")

    with pytest.raises(PromptMismatch):
        send_batch([1], send, reconnect=line.reconnect, settings=RetrySettings(request_timeout_s=1.0))
    assert line.sent[1] == 1


@pytest.mark.req("V-4", "Q-11")
def test_a_server_that_hangs_is_given_up_after_a_few_timeouts() -> None:
    line = Line()

    def hang(item: int) -> str:
        line.now_s += 10.0
        line.sent[item] += 1
        raise ServerUnavailable("no answer in time")

    retry = RetrySettings(request_timeout_s=10.0, clock=lambda: line.now_s)
    with pytest.raises(ServerUnavailable, match="not done within 40 s; last error: no answer in time"):
        send_batch(range(64), hang, reconnect=line.reconnect, settings=retry)
    assert max(line.sent.values()) == 1


@given(failures=st.dictionaries(st.integers(0, 15), st.integers(0, 5), max_size=16), size=st.integers(1, 16))
@settings(max_examples=150, deadline=None)
@pytest.mark.req("V-4")
def test_order_holds_and_no_answered_item_is_sent_again(failures: dict[int, int], size: int) -> None:
    line = Line(failures)

    try:
        replies = line.run(size)
    except ServerFailed:
        # only an item that failed alone, after at least two attempts, may end the batch
        assert any(line.sent[item] >= 2 and failures.get(item, 0) >= line.sent[item] for item in range(size))
        return
    assert replies == [f"reply {item}" for item in range(size)]
    for item in range(size):
        assert line.sent[item] == failures.get(item, 0) + 1
