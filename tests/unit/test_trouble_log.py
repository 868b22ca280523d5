"""Trouble is said once when it begins and once when it is over; what is many is said at round numbers."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.trouble_log import RoundCounts, TroubleLog
from broker_schemas.errors import BrokerFull, BrokerUnavailable
from rollstream.wiring.log_lines import JsonLines

LOG = logging.getLogger("trouble")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_many_tries_of_one_trouble_are_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = iter([10.0, 22.5])
    trouble = TroubleLog(LOG, "packer", clock=lambda: next(now))
    for number in range(40):
        trouble.on_trouble(BrokerUnavailable(f"no connection, try {number}"))
    trouble.on_well()
    trouble.on_well()
    assert lines(caplog) == [
        "packer: no connection, try 0; trying again",
        "packer: works again after 12.5 s and 40 failed tries",
    ]


def test_another_kind_of_trouble_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    trouble = TroubleLog(LOG, "packer", clock=lambda: 0.0)
    for error in (BrokerUnavailable("away"), BrokerFull("full"), BrokerFull("full")):
        trouble.on_trouble(error)
    assert lines(caplog) == ["packer: away; trying again", "packer: full; trying again"]


def test_a_role_whose_broker_goes_away_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("broker_schemas.broker.role_loop.FIRST_PAUSE_S", 0.001)
    stop, steps = threading.Event(), iter(range(6))

    def step() -> None:
        if (number := next(steps)) in (1, 2, 3):
            raise BrokerUnavailable("no answer in time")
        if number == 5:
            stop.set()

    keep_stepping(step, stop, role="matcher")
    assert [line.partition(" after")[0] for line in lines(caplog)] == [
        "matcher: no answer in time; trying again",
        "matcher: works again",
    ]


def test_events_are_due_at_the_first_the_tenth_and_the_hundredth() -> None:
    counts = RoundCounts()
    assert [number for _ in range(250) if (number := counts.due("malformed"))] == [1, 10, 100]
    assert counts.due("stale") == 1


def test_a_json_line_holds_run_role_message_and_trace_on_one_line() -> None:
    try:
        raise ValueError("odd\nwords")
    except ValueError as exc:
        record = LOG.makeRecord("x", logging.ERROR, "f", 1, "lost %d\nrows", (3,), (type(exc), exc, None))
    text = JsonLines(run="demo", role="match-0").format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert (line["run"], line["role"], line["level"], line["message"]) == (
        "demo",
        "match-0",
        "ERROR",
        "lost 3\nrows",
    )
    assert "odd" in line["traceback"]
