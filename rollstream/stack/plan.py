"""Which processes a local stack has, and the command line of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from configs import RunConfig
from rollstream.stack.bound_process import bound_command
from rollstream.stack.ports_in_use import LOOPBACK, free_loopback_port
from rollstream.wiring.package_paths import safe_environment

BROKER: Final = "broker"
LEARNER: Final = "learner"
ARCHIVE: Final = "archive"
EXPORTER: Final = "exporter"
COMMAND_OF_ROLE: Final = {
    "dispatcher": "dispatch",
    "producer": "produce",
    "matcher": "match",
    "packer": "pack",
    "evaluator": "gather",
    ARCHIVE: "archive",
    EXPORTER: "export",
    LEARNER: "learn",
}
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class RoleName:
    """One process: its role and its number among those of the role."""

    role: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What every command line carries. ``overrides`` are ``a.b.c=value`` texts, with the broker's URL."""

    config_path: Path
    overrides: tuple[str, ...]
    learner_world_size: int


RoleCommand = Callable[[RoleName, LaunchSettings], Sequence[str]]


def planned_roles(config: RunConfig) -> list[RoleName]:
    """Return the processes in starting order, without the broker.

    A run without rollout steps needs no rollouts, hence only the learner and what keeps its log.
    """
    names = [RoleName(role=ARCHIVE)] if config.archive.enabled else []
    if config.metrics.base_port:
        names.append(RoleName(role=EXPORTER))
    if config.b_ratio > 0:
        names += [RoleName(role="packer"), RoleName(role="dispatcher")]
        names += [RoleName(role="evaluator")] if config.evaluates_in_stack else []
        names += [RoleName(role="matcher", index=index) for index in range(config.matchers.num_workers)]
        names += [RoleName(role="producer", index=index) for index in range(config.producers.num_workers)]
    return [*names, RoleName(role=LEARNER)]


def role_command(name: RoleName, settings: LaunchSettings) -> list[str]:
    """Return the command line of one process; the learner's has torchrun around its ranks, on a free port."""
    own = [
        sys.executable,
        "-P",
        "-m",
        "rollstream.commands.program",
        COMMAND_OF_ROLE[name.role],
        str(settings.config_path),
    ]
    own += [part for override in settings.overrides for part in ("--set", override)]
    if name.role != LEARNER:
        return [*own, "--index", str(name.index)]
    return [
        *(sys.executable, "-P", "-m", "rollstream.stack.learner_launcher"),
        *("--nproc_per_node", str(settings.learner_world_size), "--max-restarts", "0"),
        *("--master_addr", LOOPBACK, "--master_port", str(free_loopback_port())),
        *("--no-python", *bound_command(own, parent_pid=None)),
    ]


def role_environment(num_threads: int) -> dict[str, str]:
    """Return the variables that every process gets on top of ours; 0 threads leaves their number to torch."""
    fixed = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return (
        safe_environment()
        | fixed
        | ({name: str(num_threads) for name in THREAD_VARIABLES} if num_threads else {})
    )
