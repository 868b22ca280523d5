"""The matching benchmark: it measures every case, and its reference agrees with what it measures."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from consumers.transport_targets import barycentric_targets
from rollstream.bench.matching import GEOMETRIES, OBJECT_COUNTS, MatchingBenchReport, run_matching_bench
from rollstream.bench.references.matching import reference_target
from tests.builders.settings import transport_settings
from tests.builders.tokenizers import make_polygon


@pytest.fixture(scope="module")
def report() -> MatchingBenchReport:
    return run_matching_bench(seed=1, quick=True)


def test_every_size_and_geometry_is_measured_with_the_share_of_each_stage(
    report: MatchingBenchReport,
) -> None:
    measured = [(row.geometry, row.num_objects) for row in report.rows]
    assert measured == [(geometry, count) for geometry in GEOMETRIES for count in OBJECT_COUNTS]
    for row in report.rows:
        assert sum(row.shares.values()) == pytest.approx(1.0)
        assert row.rollouts_per_second > 0


@pytest.mark.req("M-5")
def test_the_reference_finds_the_same_pairs(report: MatchingBenchReport) -> None:
    assert [row.agreement for row in report.rows] == [1.0] * len(report.rows)


@pytest.mark.req("M-9")
def test_the_reference_and_the_batched_transport_agree_within_their_blur() -> None:
    truth = make_polygon(bins=(300, 300, 520, 310, 640, 480, 500, 690, 290, 560))
    prediction = make_polygon(bins=(304, 296, 515, 314, 645, 475, 505, 696, 287, 566))
    ours = barycentric_targets(prediction, truth, transport_settings())
    assert max(abs(a - b) for a, b in zip(ours, reference_target(prediction, truth), strict=True)) <= 4


def test_the_report_is_plain_json_and_a_table(report: MatchingBenchReport) -> None:
    body = json.loads(json.dumps(report.to_json()))
    assert {name: item["limit_ms"] for name, item in body["budgets"].items()} == {
        "boxes": 0.25,
        "polygons": 2.5,
    }
    written = io.StringIO()
    Console(width=80, file=written).print(report.render())
    heads = ("shapes", "objects", "per s", "parse", "match", "targets", "build", "ref", "faster", "same")
    assert all(head in written.getvalue() for head in heads)
    assert "\u2026" not in written.getvalue(), "a head is cut at 80 columns"
    assert "parse + match + targets of 14 boxes: " in written.getvalue()
    assert "parse + match + targets of 14 polygons: " in written.getvalue()
