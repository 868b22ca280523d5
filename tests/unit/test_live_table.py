"""The live view: who waits for whom, and a table that follows the files of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from rollstream.run_folder import RunFolder
from rollstream.show.report.counting import key_numbers
from rollstream.show.report.phrases import detail_lines
from rollstream.watch.live_table import LiveView, ViewSettings, bottleneck, render_live
from tests.builders.run_folders import START_MS, make_config, make_run_folder, make_sample, make_step

NOW_MS = START_MS + 31_000


def shown(view: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(view)
    return stream.getvalue()


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"ready_depth": [0, 0]}, "learner waits for rollouts (depth 0/0, 8 being written)"),
        (
            {"ready_depth": [3, 0], "segments_waiting": 90},
            "learner waits for the matcher: 90 rollouts are not matched yet (depth 3/0)",
        ),
        (
            {"ready_depth": [0, 0], "matched_waiting": 40},
            "learner waits for the packer: 40 matched segments make no pack yet (depth 0/0)",
        ),
        (
            {"ready_depth": [0, 0], "in_flight": 0},
            "learner waits for rollouts and none is asked for (depth 0/0): look at the dispatcher",
        ),
        ({"ready_depth": [8, 8]}, "producers wait: queues full (depth 8/8 of 8)"),
        ({"in_flight": 0}, "producers wait: enough is queued (depth 3/4)"),
        ({"segments_waiting": 500}, "matcher is behind: 500 rollouts are not matched yet"),
        ({"matched_waiting": 500}, "packer is behind: 500 matched segments are in no pack yet"),
        ({}, "nobody waits long: learner busy 97% of its time, depth 3/4"),
        (
            {"roles": [{"role": "producer", "index": 1, "state": "backoff"}]},
            "producer 1 is backoff: what comes after waits",
        ),
    ],
)
def test_the_bottleneck_is_named_with_its_numbers(changes: dict[str, Any], expected: str) -> None:
    steps = [make_step(step, wait_s=0.06, busy_s=1.94) for step in range(5)]

    assert bottleneck(make_sample(**changes), steps, queue_limit=8) == expected


def test_a_learner_that_runs_a_steps_for_want_of_packs_is_said_to_do_so() -> None:
    steps = [make_step(0), make_step(1, kind="A", reason="queue_short")]

    said = bottleneck(make_sample(ready_depth=[0, 1]), steps)

    assert said.startswith("learner runs A instead (1 of the last 2 steps were short of packs)")


def test_a_learner_that_waits_with_packs_ready_is_said_to_do_so() -> None:
    assert bottleneck(make_sample(), [make_step(0, wait_s=1.0, busy_s=1.0)]) == (
        "learner waits 50% of its time although packs are ready (depth 3/4)"
    )


def test_an_empty_start_says_that_there_is_nothing_yet() -> None:
    assert "nothing to see yet" in bottleneck({}, [])
    assert "no step yet" in bottleneck(make_sample(), []) or "made no step" in bottleneck(make_sample(), [])


def test_the_view_shows_everything_an_operator_asks_for_within_80_columns(tmp_path: Path) -> None:
    text = shown(LiveView(make_run_folder(tmp_path)).render(START_MS + 150_000))

    assert max(len(line) for line in text.splitlines()) <= 80
    assert len(text.splitlines()) <= 24
    for words in (
        "scenes-demo · stage2_async",
        "60 of 60",
        "policy v59",
        "(limit 8)",
        "stale_on_claim 16",
        "malformed 1",
        "producer ●● (1 restart)",
        "lag claimed",
        "learner idle",
        "rollouts       3.56 / s",
        "claimed",
        "2 min 30 s",
    ):
        assert words in text


def test_only_what_was_appended_is_read_and_shown(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append(folder.train_log, make_step(0, loss=1.375))
    append(folder.stack_samples, make_sample(30))
    view = LiveView(folder)
    first = shown(view.render(NOW_MS))

    append(folder.train_log, make_step(1, loss=7.125))
    with folder.train_log.open("r+b") as stream:
        stream.write(b"#")
    second = shown(view.render(NOW_MS))

    assert "1.38" in first
    assert "7.12" not in first
    assert "7.12" in second
    assert "1.38" in second


def test_a_torn_line_shows_once_it_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    view = LiveView(folder)
    raw = json.dumps(make_step(3, loss=4.25)) + "\n"

    folder.train_log.write_text(raw[:40], encoding="utf-8")
    torn = shown(view.render(NOW_MS))
    with folder.train_log.open("a", encoding="utf-8") as stream:
        stream.write(raw[40:])

    assert "4.25" not in torn
    assert "4.25" in shown(view.render(NOW_MS))


def test_the_configuration_is_shown_as_soon_as_it_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append(folder.stack_samples, make_sample(30))
    view = LiveView(folder)
    before = shown(view.render(NOW_MS))

    folder.resolved_config.write_text("{broken", encoding="utf-8")
    torn = shown(view.render(NOW_MS))
    folder.resolved_config.write_text(json.dumps(make_config()), encoding="utf-8")

    assert "scenes-demo" not in before + torn
    assert "scenes-demo · stage2_async" in shown(view.render(NOW_MS))


def test_a_resumed_learner_goes_back_to_the_step_it_resumed_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append(folder.train_log, *(make_step(step) for step in range(9)))
    view = LiveView(folder)
    view.render(NOW_MS)

    append(folder.train_log, make_step(4))

    assert "step 5 " in shown(view.render(NOW_MS))


def test_a_silent_stack_is_said_to_be_silent_and_grows_no_older(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append(folder.stack_samples, make_sample(0), make_sample(30))
    view = LiveView(folder)

    alive, silent = shown(view.render(NOW_MS)), shown(view.render(NOW_MS + 600_000))

    assert "no sample for" not in alive
    assert "no sample for 10 min 01 s" in silent
    assert " 30 s ─╯" in silent


def test_an_empty_folder_and_hostile_rows_can_be_shown(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    view = LiveView(folder)
    assert "nothing to see yet" in shown(view.render(NOW_MS))

    evil = "\x1b[31m[bold]\u202e"
    append(folder.train_log, make_step(0, kind=evil, reason=evil, loss="x", fill=None, busy_s=[1]))
    append(
        folder.stack_samples,
        make_sample(ready_depth="x", dropped={evil: 3}, roles=[evil, {"role": evil, "state": evil}]),
        {name: None for name in make_sample()},
        make_sample(dropped={evil: 3}, roles=[{"role": evil, "state": evil}], time_ms=NOW_MS),
    )
    text = shown(view.render(NOW_MS))

    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]" in text


def test_more_replicas_and_ranks_than_fit_still_stay_within_80_columns(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    roles = [{"role": "producer", "index": n, "state": "running", "restarts": n} for n in range(40)]
    append(folder.stack_samples, make_sample(ready_depth=[3] * 8, roles=roles, requested=12_345_678))

    text = shown(LiveView(folder).render(NOW_MS))

    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("●") == 40
    assert "3 3 3 3 3 3 3 3" in text


@pytest.mark.req("Q-16")
def test_what_the_dispatcher_says_of_freshness_is_shown_in_the_view_and_the_report(tmp_path: Path) -> None:
    advice = "100% of the B steps cannot be served fresh: set stage2_async.version_window to 4"
    folder = make_run_folder(tmp_path)
    append(folder.stack_samples, make_sample(151, demand_advice=advice))

    text = " ".join(shown(LiveView(folder).render(START_MS + 151_000), width=200).split())

    assert advice in text
    numbers = key_numbers([], [make_sample(demand_advice=advice)], b_ratio="1")
    assert advice in [line.remark for line in detail_lines(numbers)]


def test_the_height_of_the_terminal_is_used_and_never_passed(tmp_path: Path) -> None:
    view = LiveView(make_run_folder(tmp_path)).render(NOW_MS)

    def lines(height: int, width: int = 80) -> list[str]:
        stream = io.StringIO()
        console = Console(width=width, height=height, file=stream, force_terminal=True, color_system=None)
        console.print(view)
        return stream.getvalue().splitlines()

    assert [len(lines(height)) for height in (24, 40, 60)] == [24, 40, 60]
    assert len(lines(200)) < 100  # there are sixty steps


@pytest.mark.parametrize("width", [40, 50, 60, 72, 79])
def test_narrow_heads_stay_whole(tmp_path: Path, width: int) -> None:
    text = shown(LiveView(make_run_folder(tmp_path)).render(START_MS + 150_000), width)

    assert max(len(line) for line in text.splitlines()) <= width
    for words in ("asked for", "in flight", "to match", "to pack", "ready per rank", "trained", "because"):
        assert words in text
    assert "…" not in text


def test_a_broker_that_does_not_answer_is_red_whatever_the_learner_does() -> None:
    steps = [make_step(step, wait_s=0.06, busy_s=1.94) for step in range(5)]
    silent = {"time_ms": NOW_MS, "roles": make_sample()["roles"], "broker_trouble": "no answer in time"}
    view = render_live([make_sample(30), silent], steps, ViewSettings(run_name="r"), now_ms=NOW_MS)

    stream = io.StringIO()
    Console(width=90, file=stream, force_terminal=True, color_system="standard").print(view)

    assert "\x1b[1;31m▲ the broker does not answer for 1 s: no answer in time" in stream.getvalue()
    assert "nobody waits" not in stream.getvalue()
    assert bottleneck(silent, steps).startswith("the broker does not answer")
