"""The report of a run folder: one page that needs nothing else, and the same numbers in the terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from broker_schemas.errors import ConfigError
from rollstream.run_folder import RunFolder, read_json_lines
from rollstream.show.drawing import GROUND_TRUTH_COLOUR, PREDICTION_COLOUR
from rollstream.show.report import build_report, render_html, render_terminal, write_report
from rollstream.show.report.gathering import sum_lines
from rollstream.show.report.series import Clock, running_mean, thin
from tests.builders.run_folders import (
    make_audit,
    make_config,
    make_evaluation,
    make_example,
    make_image,
    make_run_folder,
    make_sample,
    make_step,
    write_json_lines,
)

VOID = {"meta", "img", "link", "br", "hr", "input"}


class PageReader(HTMLParser):
    """Collects tags, ids, addresses and text, and checks that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run folder that no test changes."""
    return make_run_folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole_page(whole_run: RunFolder) -> str:
    return render_html(build_report(whole_run))


def terminal_text(folder: RunFolder, width: int = 80) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(render_terminal(build_report(folder)))
    return stream.getvalue()


def test_the_page_holds_every_number_plot_and_example_of_a_whole_run(whole_page: str) -> None:
    page = PageReader(whole_page)
    said = " ".join(" ".join(page.text).split())

    plots = [attributes["aria-label"] for attributes in page.all("svg")]
    assert [plot.split(":")[0] for plot in plots] == [
        "Quality before and after",
        "Loss by kind of step",
        "Ready packs per rank",
        "Policy lag",
        "Learner",
        "Fill of the packs",
        "Dropped and rejected, by reason",
        "Rollouts over time",
    ]
    assert "before: F1 any class at the gate 0.61, F1 any class IoU 0.5 0.46, F1 right class" in plots[0]
    assert (
        "F1, any class, IoU 0.3 (the gate) 0.612 0.784 F1, right class, IoU 0.3 (the gate) 0.512 0.684"
        in said
    )
    assert "ring 80 70 0.612 0.784 dot 46 48 0.310 0.310" in said
    assert len(page.all("img")) == 6
    assert all(len(attributes["alt"]) > 20 for attributes in page.all("img"))
    for words in ("stage2_async", "assets/tiny-warm", "schedule 0.4, 24 due", "queue limit 8", "balanced"):
        assert words in said
    assert "<|coord_" in said
    assert "Not in the run folder" not in said


def test_the_page_is_self_contained(whole_page: str) -> None:
    page = PageReader(whole_page)

    assert not page.all("script")
    assert not page.all("link")
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert "@import" not in whole_page
    assert set(re.findall(r"url\((.)", whole_page)) <= {"#"}
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in page.all("meta"))


def test_every_id_is_used_once_and_every_reference_has_its_id(whole_page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', whole_page)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', whole_page)

    assert len(ids) == len(set(ids))
    assert references
    assert {first or second for first, second in references} <= set(ids)


def test_every_colour_of_the_page_is_defined_for_light_and_for_dark(whole_page: str) -> None:
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", whole_page))
    light, dark = (
        set(re.findall(r"(--[a-z0-9-]+):", part)) for part in whole_page.split("@media (prefers", 1)
    )

    assert used <= light
    assert used <= dark
    assert "#0102" not in whole_page


def test_the_same_folder_gives_the_same_page(whole_run: RunFolder, whole_page: str) -> None:
    assert render_html(build_report(whole_run)) == whole_page


def test_example_pictures_are_the_images_with_both_layers_drawn_in(whole_page: str) -> None:
    page = PageReader(whole_page)

    raw = base64.b64decode(page.all("img")[0]["src"].split(",", 1)[1])
    image = Image.open(io.BytesIO(raw)).convert("RGB")

    assert image.size == (384, 384)
    pixels = np.asarray(image, dtype=int)
    for colour in (GROUND_TRUTH_COLOUR, PREDICTION_COLOUR):
        assert (np.abs(pixels - np.asarray(colour)).sum(axis=2) < 60).sum() > 150


def test_missing_parts_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "empty")
    folder.path.mkdir()

    data = build_report(folder)
    said = " ".join(PageReader(render_html(data)).text)

    assert [item.split(" ")[0] for item in data.missing] == [
        "resolved.yaml",
        "train_log.jsonl",
        "stack_samples.jsonl",
        "evaluation-<label>.json",
        "audit.json",
    ]
    assert all(item in said for item in data.missing)
    assert "no evaluation was written" in said
    assert "missing:" in terminal_text(folder)


@pytest.mark.parametrize(
    "name",
    ["resolved.yaml", "train_log.jsonl", "stack_samples.jsonl", "evaluation-before.json", "audit.json"],
)
@pytest.mark.parametrize("damage", ["gone", "binary", "wrong kind"])
def test_one_missing_or_damaged_file_is_named_and_does_not_hide_the_others(
    tmp_path: Path, name: str, damage: str
) -> None:
    folder = make_run_folder(tmp_path, num_steps=6, num_samples=8)
    path = folder.path / name
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"\xff\xfe\x00\n" if damage == "binary" else b"[1, 2]\n")

    data = build_report(folder)

    if not (name == "evaluation-before.json" and damage == "gone"):
        assert any(name in item for item in data.missing)
    if damage == "binary":
        assert len(PageReader(render_html(data)).all("svg")) >= 3


def test_an_image_that_cannot_be_opened_is_said_in_its_place(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path)
    (folder.path / "images/scene-0.png").unlink()
    (folder.path / "images/scene-1.png").write_bytes(b"no image")

    page = PageReader(render_html(build_report(folder)))

    assert len(page.all("img")) == 2
    assert " ".join(page.text).count("the image cannot be shown") == 4


def test_an_image_is_also_found_below_the_data_root(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path)
    make_image(tmp_path / "moved.png")
    example = make_example(tmp_path / "moved.png") | {"image_path": "gone/away.png"}
    folder.evaluation("before").write_text(json.dumps(make_evaluation("before", [example])), encoding="utf-8")
    folder.evaluation("after").unlink()
    config = make_config(data={"val_jsonl": str(tmp_path / "val.jsonl"), "train_jsonl": "x"})
    folder.resolved_config.write_text(json.dumps(config), encoding="utf-8")

    assert len(PageReader(render_html(build_report(folder))).all("img")) == 1


def test_hostile_text_is_escaped_and_made_visible(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\x1b[31m\u202e$\\frac{$"
    folder = make_run_folder(tmp_path, num_steps=4, num_samples=3)
    image = make_image(tmp_path / "a.png")
    example = make_example(image, sample_id=evil) | {"rollout_text": evil}
    example["predictions"][0]["desc"] = evil
    for label in ("before", "after"):
        content = make_evaluation(evil if label == "after" else label, [example])
        folder.evaluation(label).write_text(json.dumps(content), encoding="utf-8")
    write_json_lines(folder.stack_samples, [make_sample(1, dropped={evil: 3}, rejected={evil: 1})])
    write_json_lines(folder.train_log, [make_step(1, kind="A", reason=evil)])
    folder.audit.write_text(json.dumps({evil: {evil: 1}}), encoding="utf-8")

    html = render_html(build_report(folder))

    assert not PageReader(html).all("script")
    for text in (html, terminal_text(folder)):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_before_and_after_come_first_and_last_whatever_lies_between(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path)
    for label, optimizer_step in (("step-20", 20), ("step-3", 3)):
        content = make_evaluation(label, []) | {"optimizer_step": optimizer_step}
        folder.evaluation(label).write_text(json.dumps(content), encoding="utf-8")

    data = build_report(folder)

    assert [item.label for item in data.evaluations] == ["before", "step-3", "step-20", "after"]
    assert [item.label for item in data.before_and_after] == ["before", "after"]


def test_an_evaluation_beyond_the_end_of_training_is_the_last_one(whole_run: RunFolder) -> None:
    after = json.loads(whole_run.evaluation("after").read_text(encoding="utf-8"))
    later = after | {"label": "later", "optimizer_step": 87}
    whole_run.evaluation("later").write_text(json.dumps(later), encoding="utf-8")

    assert [item.label for item in build_report(whole_run).before_and_after] == ["before", "later"]


def test_an_audit_is_dated_and_one_that_the_run_outgrew_says_so(whole_run: RunFolder) -> None:
    # given an audit of after the run, and the same of a second before its last step
    last_ms = max(int(row["time_ms"]) for row in read_json_lines(whole_run.train_log))
    os.utime(whole_run.audit, (last_ms / 1000 + 60, last_ms / 1000 + 60))
    fresh = build_report(whole_run)
    os.utime(whole_run.audit, (last_ms / 1000 - 1, last_ms / 1000 - 1))
    old = build_report(whole_run)
    # then
    assert re.fullmatch(r"as of \d{4}-\d\d-\d\d \d\d:\d\d UTC", fresh.audit_note)
    assert "trained since: 1 steps" in old.audit_note
    assert old.audit_note.split(";")[0] in render_html(old)


def test_the_audit_shows_sums_parts_and_verdict() -> None:
    lines = {(line.name, line.depth): (line.value, line.verdict) for line in sum_lines(make_audit())}

    assert lines[("dropped", 0)] == ("16", "")
    assert lines[("stale_on_claim", 1)] == ("12", "")
    assert lines[("balanced", 0)] == ("yes", "good")
    assert sum_lines({"balanced": False})[0].verdict == "bad"
    assert [line.value for line in sum_lines({"problems": ["a", "b"]})] == ["2", "", ""]


def test_the_terminal_shows_the_same_numbers_within_80_columns(whole_run: RunFolder) -> None:
    text = terminal_text(whole_run)

    assert max(len(line) for line in text.splitlines()) <= 80
    for words in (
        "0.584 before 0.412",
        "38.3%",
        "schedule 0.4, 24 due",
        "stale_on_claim",
        "balanced",
        "F1, right class, IoU 0.3 (the gate)",
        "dot ",
    ):
        assert words in text


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run_folder(tmp_path, num_steps=4, num_samples=3)
    path = write_report(folder.path)
    first = path.read_text(encoding="utf-8")

    def full_disk(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rollstream.staged_folder.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(folder)

    assert path == folder.report
    assert first.startswith("<!DOCTYPE html>")
    assert path.read_text(encoding="utf-8") == first
    assert not [item for item in folder.path.iterdir() if item.name.endswith(".part")]


def test_a_wrong_path_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "span_s,unit", [(0, "seconds"), (800, "seconds"), (3600, "minutes"), (90_000, "hours")]
)
def test_the_time_axis_has_the_unit_that_fits_the_run(span_s: int, unit: str) -> None:
    rows = [make_sample(10, pushed=1), make_sample(10 + span_s, pushed=2), {"time_ms": None}]

    clock = Clock.of(rows)

    assert clock.unit == unit
    xs, ys = clock.timed(rows, "pushed")
    assert xs == [0.0, span_s * 1000 / clock.unit_ms]
    assert ys == [1.0, 2.0]


def test_long_series_are_thinned_to_means_and_short_ones_kept() -> None:
    xs = [float(x) for x in range(1000)]

    few_xs, few_ys = thin(xs, xs, largest=10)

    assert few_xs == few_ys == [49.5 + 100 * part for part in range(10)]
    assert thin(xs, xs, largest=10, join=max)[1] == [99.0 + 100 * part for part in range(10)]
    assert thin(xs[:5], xs[:5]) == (xs[:5], xs[:5])
    assert running_mean([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]


JSON_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
SAMPLE_ROWS = st.fixed_dictionaries({}, optional={name: JSON_VALUES for name in make_sample()})
STEP_ROWS = st.fixed_dictionaries(
    {}, optional={name: JSON_VALUES for name in make_step()} | {"kind": st.sampled_from(["A", "B", 3, None])}
)


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEP_ROWS, max_size=3), samples=st.lists(SAMPLE_ROWS, max_size=3), content=JSON_VALUES)
def test_no_content_of_the_files_makes_a_report_crash(
    tmp_path: Path, steps: list[dict[str, Any]], samples: list[dict[str, Any]], content: Any
) -> None:
    folder = RunFolder(tmp_path)
    write_json_lines(folder.train_log, steps)
    write_json_lines(folder.stack_samples, samples)
    wrapped = {"metrics": content, "examples": [content, {"predictions": [content], "image_path": content}]}
    folder.evaluation("before").write_text(json.dumps(wrapped), encoding="utf-8")
    folder.audit.write_text(json.dumps({"sums": content}), encoding="utf-8")

    PageReader(render_html(build_report(folder)))
    terminal_text(folder)
