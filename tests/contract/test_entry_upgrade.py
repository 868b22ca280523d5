"""What an older rollstream left waiting, its bodies inside the entries, goes its whole way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, segment_line
from broker_schemas.records import codec
from broker_schemas.records.packs import ReadyPack
from consumers.matcher import Matcher
from consumers.metrics import MatcherMetrics
from rollstream.history.audit import take_audit
from tests.builders.records import a_segment
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import matcher_settings
from tests.contract.test_transitions import a_learner, pack_all

SCRIPTS: Final = Path(__file__).resolve().parents[1] / "golden" / "scripts-1"


def call_old(broker: Broker, script: str, named_keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Call a script as the version before wrote it."""
    text = (SCRIPTS / "prelude.lua").read_text("utf-8") + (SCRIPTS / f"{script}.lua").read_text("utf-8")
    keys = [broker.keys.named(name) for name in ("events", "counters", *named_keys)]
    return broker.client.eval(text, len(keys), *keys, broker.keys.prefix, *arguments)


def push_old(broker: Broker, *names: str, body: bytes | None = None) -> None:
    arguments: list[Any] = [1 << 30, 16_384, 1 << 24, len(names)]
    for name in names:
        record = make_rollout(record_id=name)
        arguments += [segment_line(record), record.encode_body() if body is None else body]
    reply = call_old(broker, "push_segments", ["segments", "seen:now", "seen:before"], arguments)
    assert set(reply.decode().split()) == {"ok"}


def match_old(broker: Broker, *names: str, policy_version: int = 0) -> None:
    """Commit what waits as the matcher before did: payload and descriptor through the script."""
    stream = broker.keys.named("segments")
    reply: Any = broker.client.xreadgroup(MATCHER_GROUP, "old", {stream: ">"}, count=99)
    rows = reply[0][1] if isinstance(reply, list) else next(iter(reply.values()))[0]
    arguments: list[Any] = [MATCHER_GROUP, 0, len(rows)]
    for (entry_id, fields), name in zip(rows, names, strict=True):
        segment = a_segment(name, policy_version=policy_version)
        descriptor = {
            "record_id": name,
            "policy_version": policy_version,
            "encoded_length": 20,
            "sample_id": "s",
            "task": "t",
            "generated_at_ms": 1,
            "optimizer_step": -1,
        }
        line = f"{entry_id.decode()}\t{name}\tmatched\t{policy_version}\t{len(fields[b'body'])}\t20"
        arguments += [line, codec.encode_map(descriptor), segment.encode_body()]
    call_old(broker, "commit_match", ["segments", "matched", "rejected", "evaluations"], arguments)


def pack_old(broker: Broker, policy_version: int = 0) -> None:
    held = PackerDoor(broker).read(count=99, block_ms=1)
    arguments: list[Any] = [PACKER_GROUP, 0, 0, -1, len(held)]
    for rank, item in enumerate(held):
        name = item.descriptor.record_id
        pack = ReadyPack(
            pack_id=f"p-{name}", record_ids=(name,), lengths=(20,), policy_version=policy_version, fill=0.5
        )
        arguments += [rank % 2, codec.encode_map(pack.to_body()), policy_version, pack.pack_id, 1]
        arguments += [item.entry_id, name]
    assert call_old(broker, "commit_pack", ["matched", "sealed", "open_step"], arguments)[0] == 1


def a_matcher(broker: Broker) -> Matcher:
    settings = matcher_settings(block_ms=1, version_window=None)
    return Matcher(MatcherDoor(broker, "m-0"), make_tools(), MatcherMetrics(CollectorRegistry()), settings)


def assert_balanced(broker: Broker) -> None:
    status = read_status(broker, 2)
    kept = [
        key
        for kind in ("body:", "payload:")
        for key in broker.client.scan_iter(broker.keys.prefix + kind + "*")
    ]
    assert status.total("bytes") == sum(broker.client.strlen(key) for key in kept)
    audit = take_audit(read_events(broker), counters=dict(status.counters))
    assert audit.balanced, audit.faults


@pytest.mark.req("Q-3", "Q-4")
def test_rollouts_that_wait_in_old_entries_are_matched_with_the_new_ones(broker: Broker) -> None:
    push_old(broker, "a", "b")
    SegmentSink(broker).push([make_rollout(record_id="c")])
    stream = broker.keys.named("segments")
    broker.client.xreadgroup(MATCHER_GROUP, "m-0", {stream: ">"}, count=1)  # its matcher died with the first

    matcher = a_matcher(broker)
    while read_status(broker, 2).segments_waiting:
        matcher.step(0.0)

    held = PackerDoor(broker).read(count=9, block_ms=1)
    assert [item.descriptor.record_id for item in held] == ["a", "b", "c"]
    assert read_status(broker, 2).by_reason("rejected") == {}
    assert_balanced(broker)


@pytest.mark.req("Q-3", "Q-13")
def test_a_poison_record_in_an_old_entry_is_kept_with_its_raw_bytes(broker: Broker) -> None:
    push_old(broker, "a", body=b"\xc1 no msgpack")
    a_matcher(broker).step(0.0)
    ((_, letter),) = broker.client.xrange(broker.keys.named("rejected"))
    assert (letter[b"reason"], letter[b"raw"]) == (b"malformed", b"\xc1 no msgpack")
    assert_balanced(broker)


@pytest.mark.req("Q-3", "Q-10")
def test_segments_and_packs_of_before_are_packed_claimed_and_settled(broker: Broker) -> None:
    push_old(broker, "a", "b")
    match_old(broker, "a", "b")
    pack_old(broker)
    push_old(broker, "c", "d")
    match_old(broker, "c", "d")
    assert pack_all(broker, [0, 1]).num_packs == 2

    learner = a_learner(broker, packs_per_rank=2)
    claim = learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert claim.record_ids == ("a", "c", "b", "d")
    assert [segment.record_id for segment in learner.fetch_segments(claim.record_ids)] == [
        "a",
        "c",
        "b",
        "d",
    ]
    learner.commit_step(optimizer_step=0, summary={"loss": 1.0})
    learner.settle_checkpoint(optimizer_step=1)
    assert read_status(broker, 2).total("bytes") == 0
    assert_balanced(broker)


@pytest.mark.req("Q-5", "Q-17")
def test_packs_of_before_become_stale_like_any_other(broker: Broker) -> None:
    push_old(broker, "a", "b")
    match_old(broker, "a", "b")
    pack_old(broker)
    claim = a_learner(broker).claim_step(optimizer_step=0, scheduled_kind="B", policy_version=9)
    assert claim is not None
    assert (claim.kind, claim.reason) == ("A", "queue_short")
    assert read_status(broker, 2).by_reason("dropped") == {"stale": 2}
    assert_balanced(broker)
