"""The library doors to a run: write its configurations, train it; each run is a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from broker_schemas.errors import RunStopped
from configs import load_config
from rollstream.commands.new_run import plan_run, write_run
from rollstream.wiring.access import run_folder
from rollstream.wiring.package_paths import safe_environment


def new_run(
    name: str,
    data: str | Path,
    model: str | Path,
    *,
    folder: str | Path = ".",
    num_gpus: int | None = None,
    is_warm: bool = False,
) -> list[Path]:
    """Measure data and model, write the configurations of a run and return their files, the first one first.

    ``data`` is a folder that ``import_dataset`` wrote; ``is_warm``: the model writes the format already, so
    that there is no warm start. ``num_gpus`` is by default that of this machine. Raises DataError.
    """
    run = plan_run(name, Path(data), Path(model), num_gpus=num_gpus, is_warm=is_warm)
    return write_run(run, Path(folder))


def learn(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run ``rollstream learn`` on a configuration file and return the run's folder.

    Its words go to this process's standard error. Raises ConfigError, and RunStopped for any other end than
    a run that is done.
    """
    return _run("learn", config, overrides)


def up(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run ``rollstream up``, the whole stack, as ``learn`` runs the learner."""
    return _run("up", config, overrides)


def _run(command: str, config: str | Path, overrides: Sequence[str]) -> Path:
    folder = run_folder(load_config(Path(config), tuple(overrides))).path
    words = [part for override in overrides for part in ("--set", override)]
    program = (sys.executable, "-P", "-m", "rollstream.commands.program")
    done = subprocess.run([*program, command, str(config), *words], env=safe_environment(), check=False)
    if done.returncode:
        raise RunStopped(
            f"rollstream {command} {config}: ended with status {done.returncode}; what it said is above, "
            f"logs of the roles are in {folder}"
        )
    return folder
