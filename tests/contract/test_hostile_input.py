"""Bytes that no producer of ours would send: each is rejected by name, counted and kept; the loop goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.rollout_requests import issue_requests
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, SinkSettings, segment_line
from broker_schemas.records.codec import MAX_RECORD_BYTES
from broker_schemas.records.records import ImageReference
from consumers.matcher import Matcher
from consumers.metrics import MatcherMetrics
from rollstream.history.audit import take_audit
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import lease_settings, matcher_settings
from tests.contract.test_transitions import a_request

IDS = itertools.count()
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [b"kind", b"schema_version", b"record_id", b"policy_version", b"body", b"x"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def a_matcher(broker: Broker) -> Matcher:
    return Matcher(
        MatcherDoor(broker, "m-0"),
        make_tools(),
        MatcherMetrics(CollectorRegistry()),
        matcher_settings(block_ms=1, version_window=None),
    )


def push_body(broker: Broker, body: bytes, record_id: str | None = None) -> str:
    """Push ``body`` under a line that is in order; return the status."""
    record = make_rollout(record_id=record_id or f"h-{next(IDS)}")
    return push_line(broker, segment_line(record), body)


def push_line(broker: Broker, line: str | bytes, body: bytes) -> str:
    arguments: list[Any] = [1 << 30, 16_384, MAX_RECORD_BYTES, 1, line]
    record_id = (line.encode() if isinstance(line, str) else line).partition(b"\t")[0]
    bodies: list[Any] = [(broker.keys.prefix.encode() + b"raw:" + record_id, body)]
    reply = broker.run("push_segments", ["segments", "seen:now", "seen:before"], arguments, bodies=bodies)
    return str(reply.decode())


def add_entry(broker: Broker, fields: dict[bytes, bytes]) -> None:
    broker.client.xadd(broker.keys.named("segments"), fields)  # type: ignore[arg-type]


def dead_letters(broker: Broker) -> list[dict[bytes, bytes]]:
    rows: Any = broker.client.xrange(broker.keys.named("rejected"))
    return [fields for _, fields in rows]


def num_rejected(broker: Broker) -> int:
    """Rejections of both lanes: a rollout of an evaluation is counted apart from those that train."""
    status = read_status(broker, 1)
    return sum(sum(status.by_reason(kind).values()) for kind in ("rejected", "evaluation_rejected"))


def match_all_and_check(broker: Broker) -> list[dict[bytes, bytes]]:
    """Run the matcher over all that waits; return the new dead letters, after checking every sum."""
    before = num_rejected(broker)
    num_before = len(dead_letters(broker))
    matcher = a_matcher(broker)
    while read_status(broker, 1).segments_waiting:
        matcher.step(0.0)
    status = read_status(broker, 1)
    new = dead_letters(broker)[num_before:]
    assert num_rejected(broker) == before + len(new)
    assert status.segments_waiting == 0
    payloads = broker.client.scan_iter(broker.keys.payload("*"))
    assert status.total("bytes") == sum(broker.client.strlen(key) for key in payloads)
    audit = take_audit(read_events(broker), counters=dict(status.counters))
    assert audit.balanced, audit.faults
    return new


def check_the_loop_goes_on(broker: Broker) -> None:
    before = read_status(broker, 1).total("matched")
    assert SegmentSink(broker).push([make_rollout(record_id=f"good-{next(IDS)}")]) == ["ok"]
    assert match_all_and_check(broker) == []
    assert read_status(broker, 1).total("matched") == before + 1


@pytest.mark.req("Q-13", "Q-3")
@FUZZ
@given(fields=st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=40), min_size=1))
def test_any_bytes_put_straight_into_the_stream_are_rejected(
    broker: Broker, fields: dict[bytes, bytes]
) -> None:
    add_entry(broker, fields)

    (letter,) = match_all_and_check(broker)

    assert letter[b"raw"] == fields.get(b"body", b"")
    assert letter[b"reason"]
    check_the_loop_goes_on(broker)


@pytest.mark.req("Q-13", "Q-3")
@FUZZ
@given(body=st.binary(max_size=200) | ANYTHING.map(lambda value: bytes(msgpack.packb(value))))
def test_any_bytes_pushed_as_a_body_are_rejected(broker: Broker, body: bytes) -> None:
    assert push_body(broker, body) == "ok"

    (letter,) = match_all_and_check(broker)

    assert (letter[b"raw"], letter[b"reason"]) == (body, b"malformed")
    check_the_loop_goes_on(broker)


@pytest.mark.req("Q-13")
@FUZZ
@given(data=st.data())
def test_a_body_with_bytes_changed_cut_or_added_never_stops_the_loop(broker: Broker, data: Any) -> None:
    record = make_rollout(record_id=f"h-{next(IDS)}")
    body = bytearray(record.encode_body())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["change", "cut", "add"])):
            case "change":
                body[place] = data.draw(st.integers(0, 255))
            case "cut":
                del body[place : place + data.draw(st.integers(1, 40))]
            case _:
                body[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        if not body:
            break
    assert push_body(broker, bytes(body), record.record_id) == "ok"

    for letter in match_all_and_check(broker):
        assert letter[b"raw"] == bytes(body)
    check_the_loop_goes_on(broker)


@pytest.mark.req("Q-13", "Q-3")
@FUZZ
@given(name=st.sampled_from(sorted(msgpack.unpackb(make_rollout().encode_body()))), value=ANYTHING)
def test_a_field_of_any_other_type_never_stops_the_loop(broker: Broker, name: str, value: object) -> None:
    record = make_rollout(record_id=f"h-{next(IDS)}")
    fields = msgpack.unpackb(record.encode_body())
    is_other_type = type(value) is not type(fields[name])
    fields[name] = value
    body = bytes(msgpack.packb(fields))
    assert push_body(broker, body, record.record_id) == "ok"

    letters = match_all_and_check(broker)

    assert letters or not is_other_type
    assert all(letter[b"raw"] == body for letter in letters)


@pytest.mark.req("Q-13", "Q-2")
@FUZZ
@given(line=st.text(max_size=60) | st.binary(max_size=60) | st.lists(st.text(max_size=8)).map("\t".join))
def test_a_hostile_line_is_refused_and_cannot_break_the_log(broker: Broker, line: str | bytes) -> None:
    raw = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    assert push_line(broker, raw, b"x") == "bad_id"

    assert match_all_and_check(broker) == []


@pytest.mark.req("Q-13", "Q-2")
def test_texts_in_a_line_that_are_no_utf8_stay_readable_in_the_log(broker: Broker) -> None:
    line = b"h-1\t0\t\t7\t\xff\xfe\t\xc3\x28\t5\ttrain\t-1"
    assert push_line(broker, line, b"x") == "ok"

    (letter,) = match_all_and_check(broker)
    assert letter[b"reason"] == b"malformed"


@pytest.mark.req("Q-3", "Q-13")
def test_a_record_of_a_later_schema_is_rejected_as_such(broker: Broker) -> None:
    record = make_rollout()
    fields = {b"kind": b"segment", b"schema_version": b"3", b"record_id": b"r-1", b"policy_version": b"3"}
    add_entry(broker, {**fields, b"body": record.encode_body()})

    (letter,) = match_all_and_check(broker)
    assert (letter[b"reason"], letter[b"raw"]) == (b"schema_too_new", record.encode_body())
    assert b"upgrade rollstream" in letter[b"detail"]


@pytest.mark.req("Q-13", "Q-12")
def test_absurd_sizes_are_refused_before_anything_is_decoded(broker: Broker) -> None:
    sink = SegmentSink(broker, SinkSettings(max_record_bytes=200))
    assert sink.push([make_rollout()]) == ["too_large"]
    fields = {b"kind": b"segment", b"schema_version": b"1", b"record_id": b"r-1", b"policy_version": b"3"}
    add_entry(broker, {**fields, b"body": bytes(MAX_RECORD_BYTES + 1)})
    # maps, lists and texts that claim four billion items
    for body in (b"\xdf\xff\xff\xff\xff", b"\x81\xa1x\xdd\xff\xff\xff\xff", b"\x81\xa1x\xdb\xff\xff\xff\xff"):
        assert push_body(broker, body) == "ok"

    letters = match_all_and_check(broker)

    assert [letter[b"reason"] for letter in letters] == [b"too_large"] + 3 * [b"malformed"]
    assert len(letters[0][b"raw"]) == 1 << 18
    check_the_loop_goes_on(broker)


@pytest.mark.req("Q-13", "Q-4")
def test_nesting_without_end_is_rejected(broker: Broker) -> None:
    assert push_body(broker, b"\x81\xa1x" + 100_000 * b"\x91") == "ok"

    (letter,) = match_all_and_check(broker)
    assert letter[b"reason"] == b"malformed"


@pytest.mark.req("Q-13", "Q-4")
def test_another_runs_records_are_not_taken_for_ours(broker: Broker) -> None:
    """Given a rollout of ours that is matched, when its id and body come again past the script."""
    record = make_rollout(record_id="ours")
    assert SegmentSink(broker).push([record]) == ["ok"]
    assert match_all_and_check(broker) == []
    payload = broker.client.get(broker.keys.payload("ours"))
    fields = {b"kind": b"segment", b"schema_version": b"1", b"policy_version": b"3"}
    for name in ("ours", "theirs"):
        body = make_rollout(record_id=name).encode_body()
        add_entry(broker, {**fields, b"record_id": name.encode(), b"body": body})

    letters = match_all_and_check(broker)

    assert [letter[b"reason"] for letter in letters] == [b"not_admitted", b"not_admitted"]
    assert [letter[b"raw"] for letter in letters][1] == make_rollout(record_id="theirs").encode_body()
    assert broker.client.get(broker.keys.payload("ours")) == payload
    assert not broker.client.exists(broker.keys.payload("theirs"))


@pytest.mark.req("Q-13", "Q-14")
def test_another_runs_request_or_a_record_it_never_asked_for_is_refused(broker: Broker) -> None:
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=lease_settings())
    sink = SegmentSink(broker)

    assert sink.push([make_rollout(record_id="a", request_id="theirs")]) == ["late"]
    assert sink.push([make_rollout(record_id="a", request_id="r-1")]) == ["bad_id"]
    assert sink.push([make_rollout(record_id="r-1.0", request_id="r-1")]) == ["ok"]
    assert read_status(broker, 1).total("open_records") == 1


@pytest.mark.req("Q-13")
@pytest.mark.parametrize("field", ["record_id", "policy_version"])
def test_a_body_that_contradicts_its_line_is_rejected(broker: Broker, field: str) -> None:
    changes: dict[str, Any] = {"record_id": "b"} if field == "record_id" else {"policy_version": 9}
    body = make_rollout(**{"record_id": "a", **changes}).encode_body()
    assert push_body(broker, body, "a") == "ok"

    (letter,) = match_all_and_check(broker)
    assert letter[b"raw"] == body


@pytest.mark.req("Q-13")
@pytest.mark.parametrize(
    "path", ["../a.png", "a/../../b.png", "/etc/hosts", "//etc/hosts", "", ".", "a\0b", ".."]
)
def test_an_image_path_that_leaves_the_data_root_is_rejected_before_anyone_opens_it(
    broker: Broker, path: str
) -> None:
    record = make_rollout(record_id=f"h-{next(IDS)}")
    image = ImageReference(path=path, width=128, height=128, grid_thw=(1, 8, 8))
    assert SegmentSink(broker).push([replace(record, images=(image,))]) == ["ok"]

    (letter,) = match_all_and_check(broker)

    assert letter[b"reason"] in (b"image_outside_root", b"malformed")
    check_the_loop_goes_on(broker)
