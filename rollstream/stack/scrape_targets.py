"""What Prometheus is told of a stack on this machine: the files that grafana/prometheus/local.yml reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from configs import RunConfig
from rollstream.stack.plan import COMMAND_OF_ROLE, LEARNER, RoleName, planned_roles
from rollstream.staged_folder import write_atomically
from rollstream.wiring.access import PORT_OFFSETS

FOLDER: Final = ".prometheus"
ANY_ADDRESS: Final = ("0.0.0.0", "::")


def metrics_ports(config: RunConfig) -> list[tuple[RoleName, int]]:
    """Return every process that `rollstream up` starts with the port of its endpoint; none when they are off.

    The learner counts once a rank.
    """
    base_port = config.metrics.base_port
    if base_port == 0:
        return []
    names = [name for name in planned_roles(config) if name.role != LEARNER]
    names += [RoleName(role=LEARNER, index=rank) for rank in range(config.learner_world_size)]
    return [(name, base_port + PORT_OFFSETS[COMMAND_OF_ROLE[name.role]] + name.index) for name in names]


def prometheus_targets(config: RunConfig) -> list[dict[str, Any]]:
    """Return the target groups of a stack on this machine, one a role, labelled with role and run."""
    host = "127.0.0.1" if config.metrics.host in ANY_ADDRESS else config.metrics.host
    by_role: dict[str, list[str]] = {}
    for name, port in metrics_ports(config):
        by_role.setdefault(name.role, []).append(f"{host}:{port}")
    return [
        {"targets": targets, "labels": {"role": role, "run": config.run.name}}
        for role, targets in by_role.items()
    ]


def targets_path(config: RunConfig) -> Path:
    """Return the file of a run's targets; Prometheus allows a pattern in the last part of a path only."""
    return Path(config.run.output_dir) / FOLDER / f"{config.run.name}.json"


def write_targets(config: RunConfig) -> None:
    """Tell Prometheus of a stack that starts; nothing without endpoints."""
    groups = prometheus_targets(config)
    if groups:
        targets_path(config).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(targets_path(config), json.dumps(groups, indent=1) + "\n")


def remove_targets(config: RunConfig) -> None:
    """Tell Prometheus that the stack is gone: a run that ended raises no alert."""
    targets_path(config).unlink(missing_ok=True)
