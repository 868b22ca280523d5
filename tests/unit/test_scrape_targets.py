"""What Prometheus is told of a local stack: every endpoint once, and nothing when it is gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import RunConfig
from rollstream.stack.scrape_targets import (
    metrics_ports,
    prometheus_targets,
    remove_targets,
    targets_path,
    write_targets,
)
from tests.builders.configs import load_mapping, make_mapping
from tests.source_tree import ROOT


def config_of(folder: Path, **settings: Any) -> RunConfig:
    return load_mapping(folder, make_mapping(run__output_dir=str(folder / "runs"), **settings))


@pytest.mark.req("O-3", "O-4")
def test_every_process_of_the_stack_is_a_target_with_its_role_and_run(tmp_path: Path) -> None:
    # given
    config = config_of(tmp_path, metrics__base_port=9400, producers__num_workers=2)
    # when
    groups = prometheus_targets(config)
    # then
    assert {group["labels"]["role"]: group["targets"] for group in groups} == {
        "archive": ["127.0.0.1:9422"],
        "exporter": ["127.0.0.1:9423"],
        "packer": ["127.0.0.1:9421"],
        "dispatcher": ["127.0.0.1:9420"],
        "matcher": ["127.0.0.1:9430"],
        "producer": ["127.0.0.1:9460", "127.0.0.1:9461"],
        "learner": ["127.0.0.1:9400", "127.0.0.1:9401"],
    }
    assert {group["labels"]["run"] for group in groups} == {"test"}


@pytest.mark.req("O-3")
def test_no_two_processes_share_a_port(tmp_path: Path) -> None:
    config = config_of(tmp_path, metrics__base_port=9400, producers__num_workers=20, matchers__num_workers=30)
    ports = [port for _, port in metrics_ports(config)]
    assert len(ports) == len(set(ports)) == 20 + 30 + 2 + 4


def test_a_stack_listening_on_every_address_is_scraped_on_this_machine(tmp_path: Path) -> None:
    config = config_of(tmp_path, metrics__base_port=9400, metrics__host="0.0.0.0")
    assert prometheus_targets(config)[0]["targets"] == ["127.0.0.1:9422"]


def test_the_file_comes_and_goes_with_the_stack_where_prometheus_looks(tmp_path: Path) -> None:
    # given
    config = config_of(tmp_path, metrics__base_port=9400)
    # when
    write_targets(config)
    # then
    assert json.loads(targets_path(config).read_text()) == prometheus_targets(config)
    assert "runs/.prometheus/*.json" in (ROOT / "grafana/prometheus/local.yml").read_text("utf-8")
    assert targets_path(config).relative_to(tmp_path).parent == Path("runs/.prometheus")
    # and when it is gone
    remove_targets(config)
    remove_targets(config)
    assert not targets_path(config).exists()


def test_without_endpoints_nothing_is_written(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write_targets(config)
    assert not targets_path(config).parent.exists()
