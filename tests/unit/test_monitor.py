"""The line that the stack writes each second, and what the operator is told from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from broker_schemas.broker.status import RunStatus
from broker_schemas.errors import BrokerUnavailable
from broker_schemas.records.events import LogEvent
from rollstream.history.log_samples import LAG_OVER_RECORDS, GeneratedLag
from rollstream.show.report.counting import key_numbers
from rollstream.stack.monitor import Monitor
from rollstream.stack.role_messages import error_message, last_lines
from rollstream.stack.view import plain_line
from rollstream.watch.broker_watch import BrokerWatch, sample_of
from tests.builders.run_folders import make_sample, make_step

ROLES: list[dict[str, Any]] = [{"role": "producer", "index": 0, "state": "running", "pid": 7, "restarts": 2}]


def make_status(**changes: Any) -> RunStatus:
    counters: Mapping[str, int] = {
        "open_records": 8,
        "committed_steps": 12,
        "requested": 208,
        "pushed": 200,
        "matched": 198,
        "packed_segments": 190,
        "trained_segments": 160,
        "dropped:stale_on_claim": 4,
        "rejected:malformed": 1,
        "duplicates": 3,
        "bytes": 2_400_000,
    }
    values: dict[str, Any] = {
        "policy_version": 12,
        "ready_depths": (3, 4),
        "segments_waiting": 2,
        "matched_waiting": 5,
        "open_claims": 1,
        "counters": counters,
        "open_step": None,
    }
    return RunStatus(**values | changes)


def pushed(*versions: int) -> LogEvent:
    lines = "\n".join(
        f"r{number}\t{version}\t\t9\tbbox\ts-{number}\t0\ttrain\t-1"
        for number, version in enumerate(versions)
    )
    return LogEvent(event_id="1-0", kind="pushed", fields={"records": lines.encode()})


def published(policy_version: int) -> LogEvent:
    return LogEvent(
        event_id="1-0", kind="policy_published", fields={"policy_version": str(policy_version).encode()}
    )


def test_a_sample_holds_every_field_that_the_views_read() -> None:
    # given the fields that the views are tested with
    known = make_sample()
    # when
    sample = sample_of(make_status(), ROLES, time_ms=5, lag_generated_mean=0.4)
    # then none is missing, none is new, and each is of the same kind
    assert sample.keys() == known.keys()
    assert {name: type(value) for name, value in sample.items()} == {
        name: type(value) for name, value in known.items()
    }


def test_a_sample_counts_what_the_status_counts() -> None:
    sample = sample_of(make_status(), ROLES, time_ms=5, lag_generated_mean=0.25, broker_bytes=77)
    assert sample == {
        "time_ms": 5,
        "roles": ROLES,
        "ready_depth": [3, 4],
        "segments_waiting": 2,
        "matched_waiting": 5,
        "in_flight": 8,
        "policy_version": 12,
        "optimizer_step": 12,
        "requested": 208,
        "pushed": 200,
        "matched": 198,
        "packed_segments": 190,
        "trained_segments": 160,
        "dropped": {"stale_on_claim": 4},
        "rejected": {"malformed": 1},
        "duplicates": 3,
        "lag_generated_mean": 0.25,
        "demand_advice": "",
        "broker_bytes": 77,
    }


def test_a_run_that_has_not_begun_gives_zeros_and_no_policy() -> None:
    sample = sample_of(make_status(policy_version=-1, counters={}, ready_depths=(0, 0)), [], time_ms=5)
    assert sample["policy_version"] is None
    assert (sample["requested"], sample["dropped"], sample["broker_bytes"]) == (0, {}, 0)


def test_without_a_broker_the_sample_still_tells_time_and_roles_and_the_report_reads_it() -> None:
    sample = sample_of(None, ROLES, time_ms=5)
    assert sample == {"time_ms": 5, "roles": ROLES}
    assert key_numbers([], [sample], b_ratio=None).rollouts_pushed is None


def test_the_lag_is_the_version_of_the_moment_minus_that_of_the_rollout() -> None:
    # given version 3, two rollouts, a publication, and two more
    lag = GeneratedLag(3)
    lag.fold([pushed(3, 2), published(4), pushed(2, 4)])
    # then (0 + 1 + 2 + 0) / 4
    assert lag.mean == 0.75


def test_the_lag_forgets_old_rollouts_and_knows_nothing_before_the_first() -> None:
    lag = GeneratedLag(1)
    assert lag.mean is None
    lag.fold([pushed(0), pushed(*([1] * LAG_OVER_RECORDS))])
    assert lag.mean == 0.0


class _Watch:
    """Answers with what it is told to, in turn."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self._answers = list(answers)

    def sample(self, roles: object, *, time_ms: int) -> dict[str, Any]:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_monitor_outlasts_a_broker_that_is_away(tmp_path: Path) -> None:
    # given a broker that answers, is away, and answers again
    path = tmp_path / "stack_samples.jsonl"
    watch = cast(BrokerWatch, _Watch({"time_ms": 1}, BrokerUnavailable("no connection"), {"time_ms": 3}))
    monitor = Monitor(watch, path, lambda: ROLES, now_ms=lambda: 2)
    # when
    for _ in range(3):
        monitor.step()
    # then
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"time_ms": 1},
        {"time_ms": 2, "roles": ROLES, "broker_trouble": "no connection"},
        {"time_ms": 3},
    ]
    assert monitor.last_sample == {"time_ms": 3}


def test_the_monitor_outlasts_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    monitor = Monitor(cast(BrokerWatch, _Watch({"time_ms": 1})), tmp_path / "gone" / "s.jsonl", list)
    monitor.step()
    assert monitor.last_sample == {"time_ms": 1}


def test_the_plain_line_tells_step_kind_loss_depths_and_who_is_down() -> None:
    sample = make_sample(roles=[{"role": "producer", "index": 1, "state": "restarting"}])
    line = plain_line(sample, make_step(12, kind="B", reason="claimed", loss=1.25), 60)
    assert line.startswith("step 13/60 | B (claimed) loss 1.2500 | ready 3 4 | in flight 8")
    assert line.endswith("producer 1 is restarting")


@pytest.mark.parametrize(
    "sample, expected",
    [({}, "step 0/60"), ({"time_ms": 1, "roles": []}, "step 0/60 | the broker does not answer")],
)
def test_the_plain_line_of_a_stack_that_tells_little(sample: dict[str, Any], expected: str) -> None:
    assert plain_line(sample, {}, 60) == expected


def test_the_message_of_a_role_is_its_last_error_with_all_its_lines() -> None:
    written = (
        "2026-01-01 10:00:00,000 INFO run=x role=learn-0 starting\n"
        "rollstream: an earlier one\n"
        "rollstream: config.yaml: 2 problems\n  line 3: no such key\n  line 9: got 5\n"
        "W0101 10:00:00.000 torch closing process\n"
        "torchrun: rank 0 ended first, with status 2\n"
    )
    assert error_message(written) == "config.yaml: 2 problems\n  line 3: no such key\n  line 9: got 5"


def test_a_role_without_a_message_of_ours_is_quoted_with_its_last_lines() -> None:
    written = "".join(f"line {number}\n\n" for number in range(30))
    assert error_message(written) == "\n".join(f"line {number}" for number in range(18, 30))
    assert last_lines("", 3) == "(it wrote nothing)"
