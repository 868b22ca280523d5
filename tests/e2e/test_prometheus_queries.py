"""A real Prometheus beside a running stack: every query of every panel and every rule returns data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from rollstream.datasets.scenes import make_scenes
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.stack.ports_in_use import free_loopback_port
from rollstream.watch.dashboards.files import DASHBOARDS
from rollstream.wiring.access import PORT_OFFSETS
from tests.builders.ports import free_base_port
from tests.prometheus_queries import (
    alert_conditions,
    alerts,
    dashboard_queries,
    metric_names,
    recording_rules,
)
from tests.source_tree import ROOT

RUN: Final = "watched"
DEADLINE_S: Final = 480
# a window that the short run fills; the dashboards' own is Grafana's to choose
VARIABLES: Final = {
    "$__rate_interval": "30s",
    "$run": RUN,
    "$other": RUN,
    "$shift": "1ms",
    **dict.fromkeys(("$producer", "$matcher", "$learner", "$rank"), ".+"),
}
PROMETHEUS: Final = ROOT / "grafana" / "prometheus"
OVERRIDES: Final = (
    f"run.name={RUN}",
    "training.max_steps=100000",
    "training.eval_every_steps=2",
    "training.save_every_steps=4",
    "evaluation.num_samples=2",
    "devices.learner_world_size=1",
    "training.effective_batch_size=4",
    "training.per_device_train_batch_size=2",
    "custom.extra.rollout_matching.max_new_tokens=48",
    "stage2_ab.schedule.b_ratio=0.5",
)


@pytest.fixture(scope="module")
def prometheus_program() -> str:
    """The path of prometheus; missing, it skips on a laptop and fails in CI."""
    program = shutil.which("prometheus")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no prometheus: install it (Debian: apt install prometheus)")
        pytest.skip("no prometheus: install it (Debian: apt install prometheus)")
    return program


def wait_for(what: str, look: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """Return what ``look`` finds, as soon as it finds something; fails when the process ends first."""
    give_up_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_at:
        if found := look():
            return found
        assert process.poll() is None, f"{what}: ended with {process.returncode}\n{log.read_text()[-4000:]}"
        time.sleep(0.5)
    pytest.fail(f"{what}: nothing in {DEADLINE_S} s\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes], Path]]:
    """The demo's stack in small, running until the test is done."""
    root = tmp_path_factory.mktemp("stack")
    make_scenes(root / "data" / "scenes", num_train=32, num_val=4)
    log = root / "up.log"
    settings = [
        *OVERRIDES,
        f"model.name_or_path={SHIPPED_MODEL}",
        f"metrics.base_port={free_base_port(PORT_OFFSETS.values())}",
    ]
    command = [sys.executable, "-m", "rollstream.commands.program", "up", str(ROOT / "configs" / "demo.yaml")]
    command += [part for setting in settings for part in ("--set", setting)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    yield root, process, log
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def prometheus(
    prometheus_program: str, stack: tuple[Path, subprocess.Popen[bytes], Path]
) -> Iterator[httpx.Client]:
    """A Prometheus with the shipped local configuration, scraping every second."""
    root, process, log = stack
    targets = wait_for(
        "the stack's targets", lambda: list((root / "runs" / ".prometheus").glob("*.json")), process, log
    )
    assert targets[0].name == f"{RUN}.json"
    home = root / "grafana" / "prometheus"
    shutil.copytree(PROMETHEUS, home)
    config = yaml.safe_load((home / "local.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for rules in ("recording.yml", "alerts.yml"):
        content = yaml.safe_load((home / rules).read_text("utf-8"))
        content["groups"][0]["interval"] = "1s"
        (home / rules).write_text(yaml.safe_dump(content), encoding="utf-8")
    (home / "local.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_loopback_port()
    output = (root / "prometheus.log").open("wb")
    server = subprocess.Popen(
        [
            prometheus_program,
            f"--config.file={home / 'local.yml'}",
            f"--storage.tsdb.path={root / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=output,
        stderr=output,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield client
    server.terminate()
    server.wait(timeout=30)
    output.close()


def ask(client: httpx.Client, expr: str) -> list[Any]:
    """Return the series that a query finds now; none while the server is not ready."""
    filled = expr
    for variable, value in VARIABLES.items():
        filled = filled.replace(variable, value)
    try:
        reply = client.get("/api/v1/query", params={"query": filled})
    except httpx.TransportError:
        return []
    body = reply.json() if reply.status_code != 503 else {"status": "success", "data": {"result": []}}
    assert body["status"] == "success", f"{filled}: {body}"
    return list(body["data"]["result"])


def every_query() -> list[str]:
    queries = [expr for board in DASHBOARDS.values() for expr in dashboard_queries(board.to_json())]
    queries = [expr for expr in queries if metric_names(expr) != {"ALERTS"}]  # a healthy run fires none
    queries += [rule["record"] for rule in recording_rules()]
    queries += [side for alert in alerts() for side in alert_conditions(alert["expr"])]
    return sorted(set(queries))


@pytest.mark.req("O-2", "O-3", "O-4")
@pytest.mark.slow
@pytest.mark.timeout(2 * DEADLINE_S)
def test_every_query_of_every_panel_and_rule_returns_data_from_a_running_stack(
    prometheus: httpx.Client, stack: tuple[Path, subprocess.Popen[bytes], Path]
) -> None:
    # given
    _, process, log = stack
    missing = every_query()
    assert len(missing) > 80

    # when the stack has trained, evaluated and saved for a while
    def look() -> bool:
        missing[:] = [expr for expr in missing if not ask(prometheus, expr)]
        return not missing

    try:
        wait_for("data for every query", look, process, log)
    except pytest.fail.Exception:
        pytest.fail(f"no data for {len(missing)} queries:\n" + "\n".join(missing))

    # then every role was found, and no rule fails
    roles = {item["metric"]["role"] for item in ask(prometheus, "up == 1")}
    assert roles >= {"learner", "dispatcher", "producer", "matcher", "packer", "archive", "exporter"}
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    broken = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"]
    assert not broken, json.dumps(broken)
