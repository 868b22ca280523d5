"""Dashboards and rules: written from code, laid out without overlap, and about metrics that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from rollstream.commands.pages import generated_files, outdated_files, write_generated
from rollstream.commands.program import app
from rollstream.watch.dashboards.files import DASHBOARDS, dashboard_files
from rollstream.watch.metrics_table import ROLE_METRICS, declared_metrics, exported_families
from tests.prometheus_queries import (
    alert_conditions,
    alerts,
    dashboard_queries,
    metric_names,
    recorded_names,
    recording_rules,
)
from tests.source_tree import ROOT

PROMETHEUS = ROOT / "grafana" / "prometheus"
# an annotation's title, which the Prometheus data source reads and the schema leaves to it
KNOWN_TO_GRAFANA_ALONE = ["/annotations/list/0/titleFormat"]
MISSING = object()
# of every process, beside what its role declares
PROVIDED_BY_PROMETHEUS = {
    *("up", "ALERTS", "rollstream_build_info"),
    *("process_resident_memory_bytes", "process_cpu_seconds_total"),
}


PROGRAM = typer.main.get_command(app)
GENERATED = generated_files(PROGRAM)


def series_names() -> frozenset[str]:
    """Return every name that a query may use."""
    return frozenset(
        f"{metric.name}{part}"
        for metric in declared_metrics()
        for part in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    )


def known_names() -> set[str]:
    return {*series_names(), *recorded_names(), *PROVIDED_BY_PROMETHEUS}


def promtool() -> str:
    """Return the path of promtool; missing, it skips on a laptop and fails in CI."""
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no promtool: install prometheus (Debian: apt install prometheus)")
        pytest.skip("no promtool: install prometheus (Debian: apt install prometheus)")
    return program


@pytest.mark.req("O-4")
@pytest.mark.parametrize("path", sorted(GENERATED), ids=str)
def test_the_files_are_what_the_code_writes(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == GENERATED[path], (
        f"{path} is old: run 'rollstream dashboards'"
    )


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_grafanas_own_schema_reads_a_dashboard_and_writes_it_back_whole(name: str) -> None:
    """Its types for the version in the compose file: a field that they do not know is lost on the way."""
    # given
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    written = json.loads((ROOT / "grafana" / "dashboards" / f"{name}.json").read_text("utf-8"))
    # when
    read = Dashboard.from_json(written)
    back = json.loads(JSONEncoder().encode(read))
    # then
    assert sorted(lost_fields(written, back)) == KNOWN_TO_GRAFANA_ALONE


@pytest.mark.req("O-4")
def test_the_schema_is_that_of_the_grafana_that_compose_starts() -> None:
    image = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["grafana"]["image"]
    assert version("grafana-foundation-sdk").partition("!")[2] == image.partition(":")[2]


def lost_fields(written: object, back: object, path: str = "") -> Iterator[str]:
    """Yield where ``back`` lacks or changes what was ``written``."""
    if isinstance(written, dict) and isinstance(back, dict):
        for key, value in written.items():
            yield from lost_fields(value, back.get(key, MISSING), f"{path}/{key}")
    elif isinstance(written, list) and isinstance(back, list) and len(written) == len(back):
        for number, (mine, its) in enumerate(zip(written, back, strict=True)):
            yield from lost_fields(mine, its, f"{path}/{number}")
    elif written != back:
        yield path


def test_writing_twice_writes_once(tmp_path: Path) -> None:
    assert set(write_generated(PROGRAM, tmp_path)) == set(GENERATED)
    assert not outdated_files(PROGRAM, tmp_path)


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_every_query_of_a_dashboard_names_an_existing_metric(name: str) -> None:
    queries = list(dashboard_queries(json.loads(dashboard_files()[Path(f"grafana/dashboards/{name}.json")])))
    assert len(queries) > 10
    unknown = {f"{expr}: {found}" for expr in queries for found in metric_names(expr) - known_names()}
    assert not unknown, unknown


@pytest.mark.req("O-4")
def test_every_rule_names_an_existing_metric() -> None:
    exprs = [rule["expr"] for rule in (*recording_rules(), *alerts())]
    assert len(exprs) > 20
    unknown = {f"{expr}: {found}" for expr in exprs for found in metric_names(expr) - known_names()}
    assert not unknown, unknown


def test_a_query_of_a_metric_that_does_not_exist_is_found() -> None:
    expr = 'sum by (reason) (rate(rollstream_nothing_total{run="$run"}[5m])) / clamp_min(up{role="x"}, 1e-9)'
    assert metric_names(expr) == {"rollstream_nothing_total", "up"}


@pytest.mark.req("O-4")
def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    asked = {
        name
        for text in dashboard_files().values()
        for expr in dashboard_queries(json.loads(text))
        for name in metric_names(expr)
    } | {name for rule in recording_rules() for name in metric_names(rule["expr"])}
    base = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} | asked
    unseen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series_names()} - base
    # by record on the queue page, where it is told for every stage; the matcher's own count says no more
    assert {name for name in unseen if name not in series_names()} == set()
    assert unseen <= {"rollstream_match_rejections_total"}


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_panels_do_not_overlap_and_have_a_meaning(name: str) -> None:
    # given
    panels = DASHBOARDS[name].to_json()["panels"]
    # then
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["description"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


UNITS = {
    "records": "rollouts",
    "duplicate": "rollouts",
    "late": "rollouts",
    "version": "versions",
    "jobs": "requests",
    "failed": "requests",
    "reissued": "requests",
    "again": "rollouts",
    **{
        unit: unit
        for unit in (
            *("seconds", "bytes", "packs", "rollouts", "versions", "steps", "tokens", "segments", "ratio"),
            *("requests", "producers", "events", "failures"),
        )
    },
}


def units_of(expr: str) -> set[str]:
    """Return the units that the metrics of a query are named after, none of a quotient."""
    if " / " in expr:
        return set()
    found = set()
    for name in metric_names(expr):
        words = re.split(r"[_:]", re.sub(r"_(total|bucket|sum|count)$", "", name))
        found |= set([UNITS[word] for word in words if word in UNITS][-1:])
    return found


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_an_axis_has_one_unit(name: str) -> None:
    for panel in DASHBOARDS[name].panels:
        units = {unit for query in panel.queries for unit in units_of(query.expr)}
        assert len(units) <= 1, f"{panel.title}: {sorted(units)}"


def test_two_units_on_one_axis_are_seen() -> None:
    assert units_of("rate(rollstream_learner_tokens_total[1m])") == {"tokens"}
    assert units_of("rate(rollstream_learner_segments_total[1m])") == {"segments"}
    assert units_of("rollstream_waiting_jobs") != units_of("rollstream_wanted_producers")


@pytest.mark.req("O-4")
@pytest.mark.parametrize(
    "limit,watched",
    [
        ("rollstream_queue_limit_packs", "rollstream_ready_depth_packs"),
        ("rollstream_version_window_versions", "rollstream_learner_claim_lag_versions_sum"),
        ("rollstream_version_window_versions", "rollstream_lag_versions_sum"),
        ("rollstream_run_budget_bytes", "rollstream_run_bytes"),
    ],
)
def test_what_has_a_limit_is_shown_with_it_as_a_dashed_red_line(limit: str, watched: str) -> None:
    num_seen = 0
    for dashboard in DASHBOARDS.values():
        for panel in dashboard.to_json()["panels"]:
            targets = {target["refId"]: metric_names(target["expr"]) for target in panel.get("targets", ())}
            if watched not in set().union(*targets.values()) or dashboard.shifts:  # two runs: two limits
                continue
            [ref] = [ref for ref, names in targets.items() if names == {limit}]
            [line] = [
                {item["id"]: item["value"] for item in override["properties"]}
                for override in panel["fieldConfig"]["overrides"]
                if override["matcher"] == {"id": "byFrameRefID", "options": ref}
            ]
            assert line["custom.lineStyle"]["fill"] == "dash"
            assert line["color"]["fixedColor"] == "red"
            num_seen += 1
    assert num_seen


@pytest.mark.req("O-4")
def test_shares_with_an_alert_have_its_threshold_as_a_line() -> None:
    thresholds = {"rollstream:learner_wait:ratio5m": 0.2, "rollstream:drop_share:ratio5m": 0.1}
    for metric, value in thresholds.items():
        assert f"{metric} > {value}" in " ".join(alert["expr"] for alert in alerts())
        [panel] = [
            panel
            for dashboard in DASHBOARDS.values()
            for panel in dashboard.to_json()["panels"]
            if any(metric in target["expr"] for target in panel.get("targets", ()))
        ]
        defaults = panel["fieldConfig"]["defaults"]
        assert value in {step["value"] for step in defaults["thresholds"]["steps"]}
        assert defaults["custom"]["thresholdsStyle"]["mode"] == "line"


@pytest.mark.req("O-4")
def test_each_producer_matcher_learner_and_rank_has_a_row_of_its_own() -> None:
    written = DASHBOARDS["processes"].to_json()
    variables = {variable["name"]: variable for variable in written["templating"]["list"]}
    rows = [panel for panel in written["panels"] if panel["type"] == "row"]
    assert [row["repeat"] for row in rows] == ["producer", "matcher", "learner", "rank"]
    row = ""
    for panel in written["panels"]:
        row = panel.get("repeat", row)
        assert variables[row]["multi"]
        assert variables[row]["includeAll"]
        assert panel["type"] == "row" or f'=~"${row}"' in panel["targets"][0]["expr"], panel["title"]
    assert all('run="$run"' in variables[row["repeat"]]["query"]["query"] for row in rows)


@pytest.mark.req("O-4")
def test_two_runs_are_asked_the_same_and_the_other_one_is_moved_in_time() -> None:
    written = DASHBOARDS["comparison"].to_json()
    assert {"run", "other", "shift"} <= {variable["name"] for variable in written["templating"]["list"]}
    panels = [panel for panel in written["panels"] if panel["type"] != "row"]
    assert panels
    for panel in panels:
        mine, other = (target["expr"] for target in panel["targets"])
        assert other.count("offset $shift") == len(re.findall(r"\$other", other)) > 0
        assert other.replace(" offset $shift", "").replace("$other", "$run") == mine


@pytest.mark.req("O-4")
def test_what_fires_is_listed_with_the_remedy_of_its_rule_and_a_link_to_the_runbook() -> None:
    # given
    overview = DASHBOARDS["overview"].to_json()
    [table] = [panel for panel in overview["panels"] if panel["type"] == "table"]
    [column] = table["fieldConfig"]["overrides"]
    told = {item["id"]: item["value"] for item in column["properties"]}
    # then a row a firing alert, in whose column the alert's name is told as its remedy
    assert 'alertstate="firing", run="$run"' in table["targets"][0]["expr"]
    assert f'"{column["matcher"]["options"]}", "$1", "alertname"' in table["targets"][0]["expr"]
    assert table["targets"][0]["format"] == "table"
    shown = {name: shown["text"] for name, shown in told["mappings"][0]["options"].items()}
    assert shown == {alert["alert"]: alert["annotations"]["remedy"] for alert in alerts()}
    assert told["links"][0]["url"] == "${runbook}"


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_a_dashboard_links_to_the_runbook_that_compose_hands_to_grafana(name: str) -> None:
    written = DASHBOARDS[name].to_json()
    [address] = [v["query"] for v in written["templating"]["list"] if v["name"] == "runbook"]
    assert "${runbook}" in [link["url"] for link in written["links"]]
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["grafana"][
        "volumes"
    ]
    assert f"./docs/RUNBOOK.md:/usr/share/grafana{address}:ro" in volumes


@pytest.mark.req("O-4")
def test_alerts_say_what_to_do_and_have_readable_conditions() -> None:
    for alert in alerts():
        assert {"summary", "remedy"} <= set(alert["annotations"])
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert list(alert_conditions(alert["expr"])), alert["alert"]
    assert {
        *("NoProducer", "QueueEmpty", "LagAtWindow", "DropsRising", "LearnerWaiting", "RankMissing"),
        *("BrokerNearBudget", "SyncFailing"),
    } <= {alert["alert"] for alert in alerts()}


@pytest.mark.req("O-4")
def test_every_alert_has_a_test_in_which_it_fires() -> None:
    content = yaml.safe_load((PROMETHEUS / "tests" / "alerts_test.yml").read_text("utf-8"))
    firing = {
        case["alertname"]
        for test in content["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert firing == {alert["alert"] for alert in alerts()}


@pytest.mark.req("O-4")
def test_rules_pass_their_own_tests() -> None:
    done = subprocess.run(
        [promtool(), "test", "rules", "alerts_test.yml"],
        cwd=PROMETHEUS / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.req("O-3")
@pytest.mark.parametrize("role", [*sorted(ROLE_METRICS), "export"])
def test_prometheus_finds_no_fault_with_the_names_of_metrics(role: str) -> None:
    registry = CollectorRegistry()
    if role == "export":
        families = list(exported_families())
        text = generate_latest(SimpleNamespace(collect=lambda: families))  # type: ignore[arg-type]
    else:
        ROLE_METRICS[role](registry)
        text = generate_latest(registry)
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, check=False)
    # promtool takes the B of B steps for an abbreviated byte
    assert [line for line in done.stderr.decode().splitlines() if "b_step" not in line] == []


@pytest.mark.req("O-4")
@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_prometheus_takes_its_configuration(name: str) -> None:
    command = [promtool(), "check", "config", str(PROMETHEUS / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.req("O-4")
def test_grafana_is_provisioned_with_the_data_source_that_the_dashboards_ask_for() -> None:
    # given
    sources = yaml.safe_load((ROOT / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    providers = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/rollstream.yml").read_text("utf-8"))
    # then
    assert [source["type"] for source in sources["datasources"] if source["isDefault"]] == ["prometheus"]
    assert providers["providers"][0]["options"]["path"] == "/etc/grafana/dashboards"
