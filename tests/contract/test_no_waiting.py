"""Hops that do not wait: the next batch is in work while the last is under way, and nothing is lost by it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.matcher_door import MatcherDoor, RawEntry
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, SinkSettings, segment_line
from broker_schemas.errors import BrokerUnavailable, DeadlinePassed
from broker_schemas.records.records import SegmentRecord
from consumers import matcher as matching
from consumers.matcher import Matcher
from consumers.metrics import MatcherMetrics
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import matcher_settings

WAIT_S = 20.0


def a_matcher(door: MatcherDoor, *, batch_size: int = 2) -> Matcher:
    settings = matcher_settings(block_ms=1, version_window=None, batch_size=batch_size)
    return Matcher(door, make_tools(), MatcherMetrics(CollectorRegistry()), settings)


def push(broker: Broker, num: int) -> list[str]:
    names = [f"a-{number}" for number in range(num)]
    SegmentSink(broker).push([make_rollout(record_id=name) for name in names])
    return names


class Slow(MatcherDoor):
    """Holds every commit back until it is told; notes what was read."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker, "m-0")
        self.may_commit = threading.Event()
        self.read_ids: list[list[str]] = []
        self.errors: list[Exception] = []

    def read(self, **how: Any) -> list[RawEntry]:
        entries = super().read(**how)
        self.read_ids.append([entry.record_id for entry in entries])
        return entries

    def prepare_commit(self, *what: Any, **how: Any) -> Any:
        send = super().prepare_commit(*what, **how)

        def when_told() -> list[str]:
            assert self.may_commit.wait(WAIT_S)
            if self.errors:
                raise self.errors.pop()
            return send()

        return when_told


@pytest.mark.req("Q-4")
def test_a_matcher_reads_and_matches_the_next_batch_while_one_is_committed(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = push(real_broker, 6)
    door, judged, judge = Slow(real_broker), list[str](), matching.match_record

    def match_record(record: SegmentRecord, tools: Any) -> Any:
        judged.append(record.record_id)
        if len(judged) == 4:  # the second batch is in work: only now may the first be committed
            door.may_commit.set()
        return judge(record, tools)

    monkeypatch.setattr(matching, "match_record", match_record)
    matcher = a_matcher(door)
    assert [matcher.step(0.0) for _ in range(3)] == [2, 2, 2]
    assert (judged, door.read_ids) == (names, [names[:2], names[2:4], names[4:], []])
    assert read_status(real_broker, 1).total("matched") == 6


@pytest.mark.req("Q-4")
def test_what_was_read_ahead_is_found_again_after_a_kill(broker: Broker) -> None:
    names = push(broker, 5)
    door = Slow(broker)
    door.may_commit.set()
    killed = a_matcher(door)
    killed.step(0.0)
    assert door.read_ids[-1] == names[2:4]
    again = a_matcher(MatcherDoor(broker, "m-0"))
    while again.step(0.0):
        pass
    status = read_status(broker, 1)
    assert (status.total("matched"), status.segments_waiting) == (5, 0)


@pytest.mark.req("Q-4")
def test_a_look_for_lost_rollouts_takes_none_that_is_read_ahead_or_under_way(broker: Broker) -> None:
    push(broker, 6)
    matcher = a_matcher(MatcherDoor(broker, "m-0"))
    assert [matcher.step(float(10 * number)) for number in range(4)] == [2, 2, 2, 0]
    assert broker.client.hlen(broker.keys.named("tries")) == 0
    assert read_status(broker, 1).total("matched") == 6


@pytest.mark.req("Q-4")
def test_a_commit_that_fails_is_done_again_and_a_stop_leaves_nothing_in_hand(real_broker: Broker) -> None:
    push(real_broker, 6)
    door, stop = Slow(real_broker), threading.Event()
    door.errors.append(BrokerUnavailable("away"))
    door.may_commit.set()
    matcher = a_matcher(door)
    running = threading.Thread(target=matcher.loop, args=(stop,))
    running.start()
    deadline = threading.Event()
    while read_status(real_broker, 1).total("matched") < 6 and not deadline.wait(0.02):
        pass
    stop.set()
    running.join(WAIT_S)
    status = read_status(real_broker, 1)
    assert (status.total("matched"), status.segments_waiting) == (6, 0)


@pytest.mark.req("Q-12")
def test_a_producer_encodes_the_next_batch_while_one_is_pushed(real_broker: Broker) -> None:
    second_encoded = threading.Event()

    class Waiting(SegmentSink):
        def _send(self, arguments: Any, bodies: Sequence[tuple[str, bytes]], num: int) -> Any:
            assert "raw:b" in bodies[0][0] or second_encoded.wait(WAIT_S)
            return super()._send(arguments, bodies, num)

    def batches() -> Iterator[list[SegmentRecord]]:
        yield [make_rollout(record_id="a-0"), make_rollout(record_id="a-1")]
        second_encoded.set()
        yield [make_rollout(record_id="b-0"), make_rollout(record_id="b-0")]
        yield []

    pushed = list(Waiting(real_broker).push_batches(batches(), deadline_s=WAIT_S))
    assert pushed == [["ok", "ok"], ["ok", "duplicate"], []]


@pytest.mark.req("Q-12")
def test_batches_wait_for_room_and_what_was_pushed_before_the_end_of_patience_stays(broker: Broker) -> None:
    rollouts = [make_rollout(record_id=name) for name in ("a", "b")]
    sizes = [len(segment_line(item)) + len(item.encode_body()) for item in rollouts]
    room = SinkSettings(max_bytes=sum(sizes) - 1)
    with pytest.raises(DeadlinePassed, match=r"broker full for 0\.1 s"):
        list(SegmentSink(broker, room).push_batches([[item] for item in rollouts], deadline_s=0.1))
    assert SegmentSink(broker).push(rollouts) == ["duplicate", "ok"]
