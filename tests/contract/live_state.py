"""Reads the whole state of a run out of its broker, in one round trip, for comparison with a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP
from broker_schemas.broker.status import read_status
from broker_schemas.records.events import LogEvent
from broker_schemas.records.ledger import Ledger
from rollstream.history.log_samples import logged_run
from rollstream.watch.broker_watch import sample_of
from tests.contract.queue_model import WORLD_SIZE, QueueModel


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """Streams as name -> consumer in stream order; ``places`` has every id as often as it was found."""

    segments: dict[str, str | None]
    matched: dict[str, str | None]
    ready: list[list[tuple[str, ...]]]
    claims: dict[int, tuple[str, tuple[str, ...], bool]]
    sealed: dict[int, int]
    requests: dict[str, int]
    payload_bytes: dict[str, int]
    body_bytes: dict[str, int]
    counters: dict[str, int]
    num_rejected: int
    num_evaluations: int
    policy_version: int
    places: Counter[tuple[str, str]]


def _ask(
    broker: Broker, claims: list[int], requests: list[str], payloads: list[str], bodies: list[str]
) -> Iterator[Any]:
    """Yield the replies, all of one moment, in the order in which `read_live_state` takes them."""
    keys = broker.keys
    pipe = broker.client.pipeline(transaction=True)
    for stream, group in (("segments", MATCHER_GROUP), ("matched", PACKER_GROUP)):
        pipe.xrange(keys.named(stream))
        pipe.xpending_range(keys.named(stream), group, "-", "+", 1000)
    pipe.smembers(keys.named("admitted"))
    pipe.hgetall(keys.named("counters"))
    pipe.hgetall(keys.named("sealed"))
    pipe.hget(keys.named("policy"), "version")
    pipe.zrange(keys.named("claims"), 0, -1)
    pipe.zrange(keys.named("requests"), 0, -1)
    pipe.xlen(keys.named("rejected"))
    pipe.xlen(keys.named("evaluations"))
    for rank in range(WORLD_SIZE):
        pipe.xrange(keys.ready(rank))
    for step in claims:
        pipe.hgetall(keys.named(f"claim:{step}"))
    for name in requests:
        pipe.hget(keys.named(name), "remaining")
    for name in [*payloads, *bodies]:
        pipe.strlen(keys.named(name))
    for rank in range(WORLD_SIZE):
        pipe.zrange(keys.ready_versions(rank), 0, -1, withscores=True)
    yield from pipe.execute()


def _places(segments: Any, matched: Any, ready: Any, claims: Any) -> Counter[tuple[str, str]]:
    """Return where each rollout lies, and how often."""
    places = Counter[tuple[str, str]]()
    places.update((name, "segments") for name in segments)
    places.update((name, "matched") for name in matched)
    for rank, packs in enumerate(ready):
        places.update((name, f"ready:{rank}") for ids in packs for name in ids)
    for step, (_, ids, _) in claims.items():
        places.update((name, f"claim:{step}") for name in ids)
    return places


def read_live_state(broker: Broker) -> LiveState:
    """Return everything that the scripts keep."""
    prefix = broker.keys.prefix
    names = sorted(key.decode().removeprefix(prefix) for key in broker.client.scan_iter(prefix + "*", 1000))
    payloads = [name for name in names if name.startswith("payload:")]
    claims = [int(name.partition(":")[2]) for name in names if name.startswith("claim:")]
    requests = [name for name in names if name.startswith("request:")]
    bodies = [name for name in names if name.startswith("body:")]
    brought = [name for name in names if name.startswith(("raw:", "made:"))]
    assert brought == [], "a body was brought and neither taken nor let go"
    replies = _ask(broker, claims, requests, payloads, bodies)
    segment_rows, segment_held, matched_rows, matched_held = (next(replies) for _ in range(4))
    admitted = next(replies)
    counters, sealed = _numbers(next(replies)), _numbers(next(replies))
    version, open_claims, open_requests = next(replies), next(replies), next(replies)
    num_rejected, num_evaluations = next(replies), next(replies)
    packs = [next(replies) for _ in range(WORLD_SIZE)]
    ready = [[tuple(fields[b"ids"].decode().split()) for _, fields in entries] for entries in packs]
    claim_fields = {step: _claim(next(replies)) for step in claims}
    remaining = {name.partition(":")[2]: int(next(replies)) for name in requests}
    payload_bytes = {name.partition(":")[2]: int(next(replies)) for name in payloads}
    body_bytes = {name.partition(":")[2]: int(next(replies)) for name in bodies}
    for entries in packs:
        versions = sorted((int(fields[b"version"]), _sortable(entry)) for entry, fields in entries)
        found = [(int(version), member) for member, version in next(replies)]
        assert found == versions, "ready:<rank>:versions and ready:<rank> disagree"
    assert sorted(int(item) for item in open_claims) == sorted(claims), "claims and claim:<step> disagree"
    assert {item.decode() for item in open_requests} == set(remaining), "requests and request:<id> disagree"
    assert admitted <= {entry for entry, _ in segment_rows}, "an admitted entry is not in the stream"
    segments = _stream(segment_rows, segment_held, admitted)
    matched = _stream(matched_rows, matched_held, {entry for entry, _ in matched_rows})
    places = _places(segments, matched, ready, claim_fields)
    return LiveState(
        segments=segments,
        matched=matched,
        ready=ready,
        claims=claim_fields,
        sealed={int(step): number for step, number in sealed.items()},
        requests=remaining,
        payload_bytes=payload_bytes,
        body_bytes=body_bytes,
        counters=counters,
        num_rejected=int(num_rejected),
        num_evaluations=int(num_evaluations),
        policy_version=-1 if version is None else int(version),
        places=places,
    )


def _sortable(entry: bytes) -> bytes:
    milliseconds, _, number = entry.partition(b"-")
    return milliseconds + b"-" + number.rjust(12, b"0")


def _numbers(fields: dict[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in fields.items()}


def _stream(rows: Any, held: Any, admitted: set[bytes]) -> dict[str, str | None]:
    owners = {item["message_id"]: item["consumer"].decode() for item in held}
    assert set(owners) <= {entry for entry, _ in rows}, "an entry is pending that the stream no longer has"
    return {
        fields[b"record_id"].decode() if entry in admitted else f"foreign:{entry.decode()}": owners.get(entry)
        for entry, fields in rows
    }


def _claim(fields: dict[bytes, bytes]) -> tuple[str, tuple[str, ...], bool]:
    named = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    places = sorted(name for name in named if name.startswith("ids:"))
    ids = tuple(segment for name in places for segment in named[name].split())
    return named["kind"], ids, "committed" in named


def check_sums(live: LiveState, model: QueueModel, ledger: Ledger) -> None:
    """Assert that the running sums of the broker are those of the model and of the log."""
    counters = dict(live.counters)
    assert counters.pop("bytes", 0) == model.num_bytes
    counters.pop("log_bytes", 0), counters.pop("budget", 0)
    held = model.payload_bytes
    assert (counters.pop("payloads", 0), counters.pop("payload_bytes", 0)) == (len(held), sum(held.values()))
    assert counters.pop("covered_steps", 0) == model.covered_steps
    assert counters.pop("settled_steps", 0) == model.settled_steps == ledger.settled_steps
    assert counters == {name: number for name, number in model.counters.items() if number or name in counters}
    assert live.num_evaluations == model.counters["evaluated"]
    given_up = {"generation_failed", "abandoned"}
    rejected = [item for item in model.rollouts.values() if item.stage == "rejected"]
    assert live.num_rejected == sum(item.reason not in given_up for item in rejected)
    assert ledger.reissued == model.counters["reissued"]
    assert set(ledger.committed) >= {step for step, claim in model.claims.items() if claim.is_committed}


def check_samples(broker: Broker, events: list[LogEvent]) -> None:
    """The log tells a sample as the broker does, but for what only the broker knows."""
    only_the_broker = {"time_ms", "duplicates", "lag_generated_mean", "broker_bytes", "segments_waiting"}
    told = sample_of(read_status(broker, WORLD_SIZE), [], time_ms=0)
    logged = logged_run(events, WORLD_SIZE).samples
    if not logged:
        assert not any(told["ready_depth"])
        return
    # entries that somebody adds past the script are in the stream and in no event
    assert 0 <= logged[-1]["segments_waiting"] <= told["segments_waiting"]
    folded = {name: value for name, value in logged[-1].items() if name not in only_the_broker}
    assert folded == {name: value for name, value in told.items() if name not in only_the_broker}
