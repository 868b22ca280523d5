"""Bodies lie beside the streams: linked when admitted, let go when not, counted, and missed by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.keys import MATCHER_GROUP
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.payloads import fetch_segments
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, SinkSettings, segment_line
from broker_schemas.errors import BodyMissing, BrokerError, BrokerFull, BrokerUnavailable
from consumers.matcher import Matcher
from consumers.metrics import MatcherMetrics
from rollstream.history.audit import take_audit
from tests.builders.records import a_rollout, a_segment
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import matcher_settings
from tests.contract.test_transitions import a_learner, match_all, pack_all, push, ready_packs


def names_of(broker: Broker, start: str) -> list[str]:
    """Return the ids of the run's keys of a kind."""
    prefix = f"{broker.keys.prefix}{start}:"
    return sorted(key.decode().removeprefix(prefix) for key in broker.client.scan_iter(prefix + "*"))


def push_lines(broker: Broker, *lines: str, budget: int = 1 << 30) -> Any:
    arguments: list[Any] = [budget, 16_384, 1_000, len(lines), *lines]
    return broker.run("push_segments", ["segments", "seen:now", "seen:before"], arguments)


def bring(broker: Broker, record_id: str, body: bytes) -> None:
    broker.client.set(broker.keys.raw(record_id), body, ex=120)


@pytest.mark.req("Q-3", "Q-12")
def test_an_admitted_body_stays_and_the_entry_holds_none(broker: Broker) -> None:
    push(broker, "a")
    ((_, fields),) = broker.client.xrange(broker.keys.named("segments"))
    body, line = a_rollout("a").encode_body(), segment_line(a_rollout("a")).encode()
    assert fields == {
        b"kind": b"segment",
        b"schema_version": b"2",
        b"record_id": b"a",
        b"policy_version": b"0",
        b"bytes": str(len(body) + len(line)).encode(),
        b"line": line,
    }
    assert broker.client.get(broker.keys.body("a")) == body
    assert broker.client.ttl(broker.keys.body("a")) == -1
    assert names_of(broker, "raw") == []
    (entry,) = MatcherDoor(broker, "m-0").read(count=9, block_ms=1)
    assert (entry.body, entry.num_bytes) == (body, len(body) + len(entry.line))


@pytest.mark.req("Q-12")
def test_a_payload_stays_until_it_is_settled_and_its_rollouts_body_goes(broker: Broker) -> None:
    push(broker, "a")
    assert match_all(broker) == ["matched"]
    ((_, fields),) = broker.client.xrange(broker.keys.named("matched"))
    assert set(fields) == {
        *(b"schema_version", b"record_id", b"policy_version", b"encoded_length", b"optimizer_step"),
    }
    assert broker.client.ttl(broker.keys.payload("a")) == -1
    assert names_of(broker, "body") == names_of(broker, "made") == []
    assert read_status(broker, 1).total("bytes") == broker.client.strlen(broker.keys.payload("a"))


@pytest.mark.req("Q-4", "Q-12")
def test_bodies_that_are_not_admitted_are_let_go_at_once(broker: Broker) -> None:
    push(broker, "a")
    lines = [segment_line(a_rollout(name)) for name in ("a", "big", "late", "b", "b")]
    lines[2] = segment_line(a_rollout("late", request_id="closed"))
    for name, size in (("a", 9), ("big", 1_001), ("late", 9), ("b", 9)):
        bring(broker, name, bytes(size))
    assert push_lines(broker, *lines) == b"duplicate too_large late ok duplicate"
    assert (names_of(broker, "raw"), names_of(broker, "body")) == ([], ["a", "b"])
    bring(broker, "c", bytes(9))
    assert push_lines(broker, segment_line(a_rollout("c")), budget=10)[0] == b"full"
    assert names_of(broker, "raw") == []


@pytest.mark.req("Q-12")
def test_a_body_that_its_call_does_not_take_goes_with_it(broker: Broker) -> None:
    """Given a line that names no record, a script that the server forgot, and one that fails."""
    assert SegmentSink(broker).push([a_rollout("a b")]) == ["bad_id"]
    broker.client.script_flush()
    assert push(broker, "before") == ["ok"]
    segments = broker.keys.named("segments")
    broker.client.rename(segments, "aside")
    broker.client.set(segments, "of another type")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        push(broker, "fails")
    broker.client.rename("aside", segments)
    assert names_of(broker, "raw") == []
    assert match_all(broker) == ["matched"]


@pytest.mark.req("Q-12")
def test_a_payload_whose_matcher_died_is_taken_like_any_other(broker: Broker) -> None:
    door = MatcherDoor(broker, "m-0")
    push(broker, "a")
    (entry,) = door.read(count=9, block_ms=1)
    broker.client.set(broker.keys.made("a"), b"x", ex=120)  # its matcher died before its script
    assert 0 < broker.client.ttl(broker.keys.made("a")) <= 120
    verdict = MatchVerdict(entry=entry, outcome="matched", segment=a_segment("a"))
    assert door.commit([verdict], oldest_policy_version=0) == ["matched"]
    assert fetch_segments(broker, ["a"])[0].record_id == "a"


@pytest.mark.req("Q-12", "Q-4")
def test_a_line_without_its_body_is_told_and_changes_nothing(broker: Broker) -> None:
    bring(broker, "b", b"x")
    lines = [segment_line(a_rollout(name)) for name in ("a", "b")]
    assert push_lines(broker, *lines) == b"no_body ok"
    status = read_status(broker, 1)
    assert (status.total("pushed"), status.segments_waiting) == (1, 1)
    assert status.total("bytes") == 1 + len(lines[1])
    bring(broker, "a", b"x")
    assert push_lines(broker, lines[0]) == b"ok"


@pytest.mark.req("Q-4", "Q-12")
def test_an_empty_body_is_a_body(broker: Broker) -> None:
    bring(broker, "a", b"")
    assert push_lines(broker, segment_line(a_rollout("a"))) == b"ok"
    (entry,) = MatcherDoor(broker, "m-0").read(count=9, block_ms=1)
    assert (entry.body, entry.num_bytes) == (b"", len(entry.line))


@pytest.mark.req("Q-4")
def test_an_id_is_a_duplicate_as_long_as_its_rollout_is_here(broker: Broker) -> None:
    """Given an id that both generations of `seen` have forgotten, while it waits for matcher or learner."""
    sink = SegmentSink(broker, SinkSettings(dedup_window=1))
    sink.push([a_rollout("a")])
    for name in ("x", "y"):
        sink.push([a_rollout(name)])
    body = broker.client.get(broker.keys.body("a"))
    assert sink.push([a_rollout("a", producer="another")]) == ["duplicate"]
    assert broker.client.get(broker.keys.body("a")) == body
    match_all(broker)
    assert sink.push([a_rollout("a")]) == ["duplicate"]
    assert (names_of(broker, "body"), names_of(broker, "raw")) == ([], [])


@pytest.mark.req("Q-4", "Q-13")
def test_a_body_that_is_gone_rejects_its_rollout_by_that_name(broker: Broker) -> None:
    rollouts = [make_rollout(record_id=name) for name in ("a", "b")]
    SegmentSink(broker).push(rollouts)
    broker.client.delete(broker.keys.body("a"))
    matcher = Matcher(
        MatcherDoor(broker, "m-0"),
        make_tools(),
        MatcherMetrics(CollectorRegistry()),
        matcher_settings(block_ms=1, version_window=None),
    )
    assert matcher.step(0.0) == 2
    status = read_status(broker, 1)
    assert (status.by_reason("rejected"), status.total("matched")) == ({"body_missing": 1}, 1)
    ((_, letter),) = broker.client.xrange(broker.keys.named("rejected"))
    assert (letter[b"record_id"], letter[b"raw"]) == (b"a", b"")
    assert b"evicts nothing" in letter[b"detail"]
    assert status.total("bytes") == broker.client.strlen(broker.keys.payload("b"))
    audit = take_audit(read_events(broker), counters=dict(status.counters))
    assert audit.balanced, audit.faults


@pytest.mark.req("Q-13")
def test_a_payload_that_is_gone_is_named_to_the_learner(broker: Broker) -> None:
    ready_packs(broker, "a", "b", ranks=[0, 1])
    broker.client.delete(broker.keys.payload("b"))
    with pytest.raises(BodyMissing, match="segment b: no payload in the broker") as caught:
        fetch_segments(broker, ["a", "b"])
    assert caught.value.reason == "body_missing"


@pytest.mark.req("Q-12", "Q-13")
@pytest.mark.parametrize("gone", [("a",), ("b", "d"), ("a", "b", "c", "d")])
def test_the_bytes_of_payloads_that_are_gone_do_not_stay_counted(
    broker: Broker, gone: tuple[str, ...]
) -> None:
    """Given two steps of two packs, when payloads of both are taken away by another hand."""
    ready_packs(broker, "a", "b", "c", "d", ranks=[0, 1, 0, 1])
    learner = a_learner(broker)
    for name in gone:
        broker.client.delete(broker.keys.payload(name))

    for step in (0, 1):
        assert learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0) is not None
    learner.settle_checkpoint(optimizer_step=2)

    status = read_status(broker, 2)
    assert (status.total("bytes"), status.total("payloads"), status.total("payload_bytes")) == (0, 0, 0)


@pytest.mark.req("Q-4", "Q-12")
def test_a_segment_that_is_gone_before_it_is_taken_leaves_its_rollout_pending(broker: Broker) -> None:
    push(broker, "a", "b")
    door = MatcherDoor(broker, "m-0")
    entries = door.read(count=9, block_ms=1)
    lines: list[Any] = []
    for entry in entries:
        lines += [f"{entry.entry_id.decode()}\t{entry.record_id}\tmatched\t0\t{entry.num_bytes}\t-1\t20", ""]
    broker.client.set(broker.keys.made("b"), a_segment("b").encode_body(), ex=120)
    streams = ["segments", "matched", "rejected", "evaluations"]
    assert broker.run("commit_match", streams, ["matcher", 0, 2, *lines]) == b"no_body matched"
    assert [entry.record_id for entry in door.found_again(0.0, count=9)] == ["a"]


@pytest.mark.req("Q-12")
def test_a_stale_or_lost_commit_leaves_no_payload(broker: Broker) -> None:
    push(broker, "a", version=1)
    first, second = MatcherDoor(broker, "m-0", idle_ms=0), MatcherDoor(broker, "m-1", idle_ms=0)
    entries = first.read(count=9, block_ms=1)
    verdicts = [MatchVerdict(entry=entry, outcome="matched", segment=a_segment("a")) for entry in entries]
    assert second.found_again(0.0, count=9)
    assert second.commit(verdicts, oldest_policy_version=2) == ["dropped"]
    assert first.commit(verdicts, oldest_policy_version=0) == ["gone"]
    for kind in ("raw", "body", "made", "payload"):
        assert names_of(broker, kind) == []
    assert read_status(broker, 1).total("bytes") == 0


@pytest.mark.req("Q-12")
def test_a_server_out_of_memory_admits_nothing_and_says_full(redis_url: str, real_broker: Broker) -> None:
    broker = real_broker
    push(broker, "a")
    before = read_status(broker, 1)
    limit = broker.client.config_get("maxmemory")["maxmemory"]
    broker.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerFull, match="out of memory"):
            push(broker, "b", "c")
    finally:
        broker.client.config_set("maxmemory", limit)
    assert read_status(broker, 1) == before
    assert names_of(broker, "raw") == []
    assert push(broker, "b", "c") == ["ok", "ok"]


def test_a_sink_whose_bodies_vanish_says_so(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = broker.run
    monkeypatch.setattr(type(broker), "run", lambda self, *call, bodies=(): run(*call))
    with pytest.raises(BrokerUnavailable, match="2 bodies were gone"):
        push(broker, "a", "b")


def waiting(broker: Broker) -> list[str]:
    rows: Any = broker.client.xrange(broker.keys.named("segments"))
    return [fields[b"record_id"].decode() for _, fields in rows]


def drop(door: MatcherDoor, entries: Sequence[RawEntry]) -> list[str]:
    verdicts = [MatchVerdict(entry=entry, outcome="dropped", reason="stale") for entry in entries]
    return door.commit(verdicts, oldest_policy_version=0)


@pytest.mark.req("Q-4")
def test_a_commit_takes_its_own_entries_off_wherever_they_stand(broker: Broker) -> None:
    names = [f"a-{number}" for number in range(6)]
    push(broker, *names)
    first, second = MatcherDoor(broker, "m-0"), MatcherDoor(broker, "m-1")
    early, late = first.read(count=2, block_ms=1), second.read(count=3, block_ms=1)
    assert drop(second, late[1:]) == ["dropped"] * 2
    assert waiting(broker) == [*names[:3], names[5]]
    assert drop(first, early[::-1]) == ["dropped"] * 2
    assert waiting(broker) == [names[2], names[5]]
    assert drop(second, late[:1]) == ["dropped"]
    assert waiting(broker) == [names[5]]


@pytest.mark.req("Q-4")
def test_an_entry_past_the_script_hides_none_of_a_commit(broker: Broker) -> None:
    push(broker, "a")
    fields: Any = {"kind": "segment", "schema_version": "1", "record_id": "foreign", "body": b"x"}
    broker.client.xadd(broker.keys.named("segments"), fields)
    push(broker, "b", "c")
    door = MatcherDoor(broker, "m-0")
    first, foreign, second, third = door.read(count=9, block_ms=1)
    assert drop(door, [first, foreign, third]) == ["dropped", "rejected", "dropped"]
    assert waiting(broker) == [second.record_id]


@pytest.mark.req("Q-4")
@pytest.mark.parametrize("num_given_again", [0, 1, 3])
def test_a_commit_into_a_group_that_was_made_again_takes_off_nothing_undelivered(
    broker: Broker, num_given_again: int
) -> None:
    names = [f"a-{number}" for number in range(6)]
    push(broker, *names)
    door, other = MatcherDoor(broker, "m-0"), MatcherDoor(broker, "m-1")
    entries = door.read(count=4, block_ms=1)
    broker.client.xgroup_destroy(broker.keys.named("segments"), MATCHER_GROUP)
    broker.make_groups()
    if num_given_again:
        other.read(count=num_given_again, block_ms=1)
    assert drop(door, entries[1:]) == ["dropped"] * 3
    assert waiting(broker) == [names[0], *names[4:]]


@pytest.mark.req("Q-7", "Q-16")
def test_a_claim_reads_no_pack_that_it_does_not_take(real_broker: Broker) -> None:
    """Given many ready packs that are fresh, when steps are decided: none of their entries is read."""
    broker = real_broker
    names = [f"s-{number}" for number in range(60)]
    push(broker, *names)
    match_all(broker)
    pack_all(broker, [number % 2 for number in range(60)], queue_limit=0)
    learner = a_learner(broker, packs_per_rank=2)
    broker.client.config_resetstat()
    assert learner.claim_step(optimizer_step=0, scheduled_kind="A", policy_version=0) is not None
    calls = broker.client.info("commandstats")
    assert "cmdstat_xrange" not in calls
    claim = learner.claim_step(optimizer_step=1, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert claim.num_segments == 4
    assert broker.client.info("commandstats")["cmdstat_xrange"]["calls"] == 4  # those it takes


@pytest.mark.req("Q-8", "Q-12")
@pytest.mark.parametrize("archived_only", [False, True])
def test_a_claim_that_another_hand_took_away_does_not_stop_those_behind_it(
    broker: Broker, archived_only: bool
) -> None:
    ready_packs(broker, "a", "b", "c", "d", ranks=[0, 1, 0, 1])
    learner = a_learner(broker, archived_only=archived_only)
    for step in (0, 1):
        assert learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0) is not None
    last = list(read_events(broker))[-1].event_id
    broker.client.hset(broker.keys.named("archive"), "cursor", last)
    broker.client.delete(broker.keys.named("claim:0"))

    learner.settle_checkpoint(optimizer_step=2)

    status = read_status(broker, 2)
    assert (status.open_claims, status.total("settled_segments"), status.total("committed_steps")) == (
        0,
        2,
        1,
    )
