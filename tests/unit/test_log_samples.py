"""The log told as samples: at even times, with no rows while nothing ran, and nowhere but in it."""

from __future__ import annotations

from broker_schemas.records import codec
from broker_schemas.records.events import LogEvent
from rollstream.history.log_samples import logged_run


def event(at_ms: int, type_: str, /, **fields: str | bytes) -> LogEvent:
    raw = {name: value if isinstance(value, bytes) else value.encode() for name, value in fields.items()}
    return LogEvent(event_id=f"{at_ms}-0", kind=type_, fields=raw)


def pushed(at_ms: int, *names: str) -> LogEvent:
    rows = "\n".join(f"{name}\t0\t\t9\tbbox\ts\t0\ttrain\t-1" for name in names)
    return event(at_ms, "pushed", records=rows)


def test_a_rollout_is_counted_at_each_place_while_it_is_there() -> None:
    # given two rollouts asked for, and one way through the queue, two seconds a transition
    log = [
        event(0, "requested", request_id="r", ids="a b", purpose="train"),
        pushed(2000, "a"),
        event(4000, "matched", records="a\t40"),
        event(6000, "packed", rank="1", pack_id="p", policy_version="0", ids="a"),
        event(8000, "claimed", optimizer_step="0", kind="B", reason="claimed", packs="1\tp\t0\ta"),
        event(10_000, "committed", optimizer_step="0", summary=codec.encode_map({"kind": "B", "loss": 1.5})),
    ]
    # when
    told = logged_run(log, 2)
    # then a sample a second, each with the state of its moment
    at = {row["time_ms"]: row for row in told.samples}
    assert sorted(at) == list(range(0, 10_000, 1000)) + [10_000]
    assert [at[ms]["in_flight"] for ms in (1000, 3000)] == [2, 1]
    assert [at[ms]["segments_waiting"] for ms in (3000, 5000)] == [1, 0]
    assert [at[ms]["matched_waiting"] for ms in (5000, 7000)] == [1, 0]
    assert [at[ms]["ready_depth"] for ms in (5000, 7000, 9000)] == [[0, 0], [0, 1], [0, 0]]
    assert [at[ms]["trained_segments"] for ms in (9000, 10_000)] == [0, 1]
    assert told.steps == [{"time_ms": 10_000, "kind": "B", "loss": 1.5, "optimizer_step": 0}]


def test_a_request_that_failed_loses_only_what_never_came() -> None:
    log = [
        event(0, "requested", request_id="r", ids="a b", purpose="train"),
        pushed(1, "a"),
        event(2, "request_failed", request_id="r", reason="abandoned", ids="a b"),
    ]
    last = logged_run(log, 1).samples[-1]
    assert (last["in_flight"], last["segments_waiting"], last["rejected"]) == (0, 1, {"abandoned": 1})


def test_a_pause_of_the_stack_has_no_samples_and_a_quiet_minute_has() -> None:
    def log(end: str) -> list[LogEvent]:
        return [pushed(0, "a"), event(60_000, end, role="packer", ids="", purpose="train")]

    assert len(logged_run(log("lease_taken"), 1).samples) == 2
    assert len(logged_run(log("requested"), 1).samples) == 61


def test_no_event_gives_no_sample() -> None:
    assert logged_run([], 2).samples == []
