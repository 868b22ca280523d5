"""Every byte that a caller makes the broker hold is counted or bounded: lines, and the log with and without
an archive [Q-12].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, SinkSettings, segment_line
from broker_schemas.errors import BrokerFull
from rollstream.history.archive import ArchiveWriter
from tests.builders.records import a_rollout
from tests.builders.settings import claim_settings

BUDGET = 64_000


def push_and_reject(broker: Broker, *, numbers: range) -> None:
    """Let rollouts come and go whose lines are as long as may be."""
    door = MatcherDoor(broker, "m-0")
    sink = SegmentSink(broker, SinkSettings(max_bytes=BUDGET))
    for number in numbers:
        sink.push([a_rollout(f"a-{number}", sample_id="s" * 700, task="t" * 700)])
        entries = door.read(count=9, block_ms=1)
        verdicts = [MatchVerdict(entry=e, outcome="rejected", reason="malformed") for e in entries]
        door.commit(verdicts, oldest_policy_version=0)


def log_bytes(broker: Broker) -> int:
    rows: Any = broker.client.xrange(broker.keys.named("events"))
    return sum(64 - len("type") + sum(len(k) + len(v) for k, v in fields.items()) for _, fields in rows)


@pytest.mark.req("Q-12")
def test_a_line_counts_against_the_budget_until_its_rollout_leaves(broker: Broker) -> None:
    record = a_rollout("a", sample_id="s" * 700)
    SegmentSink(broker).push([record])
    held = len(record.encode_body()) + len(segment_line(record))
    assert read_status(broker, 1).total("bytes") == held
    with pytest.raises(BrokerFull):
        SegmentSink(broker, SinkSettings(max_bytes=2 * held - 1)).push([a_rollout("b", sample_id="s" * 700)])
    entries = MatcherDoor(broker, "m-0").read(count=9, block_ms=1)
    verdicts = [MatchVerdict(entry=entries[0], outcome="dropped", reason="stale")]
    MatcherDoor(broker, "m-0").commit(verdicts, oldest_policy_version=0)
    assert read_status(broker, 1).total("bytes") == 0


@pytest.mark.req("Q-12")
def test_a_log_that_no_archive_keeps_stays_within_its_share(broker: Broker) -> None:
    door = LearnerDoor(broker, claim_settings(world_size=1, mode="wait"))
    for first in range(0, 60, 5):
        push_and_reject(broker, numbers=range(first, first + 5))
        door.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    status = read_status(broker, 1)
    assert status.total("log_bytes") == log_bytes(broker) <= BUDGET / 8
    assert status.total("pushed") == 60
    assert status.total("log_trimmed") + len(list(read_events(broker))) == 120


@pytest.mark.req("Q-12", "Q-20")
def test_a_log_that_an_archive_keeps_loses_nothing_and_a_lagging_archive_slows_producers(
    broker: Broker, tmp_path: Path
) -> None:
    archive = ArchiveWriter(broker, tmp_path / "archive")
    archive.step(block_ms=1)  # it is there, and sees nothing yet
    with pytest.raises(BrokerFull):
        push_and_reject(broker, numbers=range(60))
    num_pushed = read_status(broker, 1).total("pushed")
    assert 10 < num_pushed < 60
    assert len(list(read_events(broker))) >= 2 * num_pushed
    while archive.step(block_ms=1):
        pass
    assert log_bytes(broker) == read_status(broker, 1).total("log_bytes") <= BUDGET / 8
    push_and_reject(broker, numbers=range(num_pushed, num_pushed + 5))
    assert read_status(broker, 1).total("log_trimmed") == 0
    archive.close()
