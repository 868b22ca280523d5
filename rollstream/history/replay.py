"""`rollstream replay RUN`: trains again from the archived log, without producers or a broker [Q-15].

Owns the folder of a replay and the start of its ranks; what a rank does is in ``replay_rank``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from broker_schemas.errors import ConfigError, DataError, RunStopped
from configs import RunConfig, load_config
from consumers.packing import SELECTION_METHODS, SelectionMethod, require_method
from rollstream.history.replay_plan import StepRange, archived_ledger, step_range
from rollstream.history.replay_report import ReplayReport, compare_logs, weights_equal
from rollstream.run_folder import RunFolder
from rollstream.wiring.package_paths import safe_environment

METHOD_KEYS: Final = (
    "target_sigma",
    "target_truncate",
    "temperature_coord",
    "soft_ce_weight",
    "w1_weight",
    "gate_weight",
    "duplicate_weight",
)
"""Loss settings below ``custom.extra.rollout_matching``; ``desc_ce_weight`` is below ``stage2_ab``."""


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """``first_step`` needs the run's checkpoint of that step; None: from the start model.

    ``end_step`` None: to the last step in the archive. ``loss`` are ``key=value`` texts.
    """

    first_step: int | None = None
    end_step: int | None = None
    packing_selector: str | None = None
    loss: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What every rank of a replay is told, as JSON in its folder."""

    resolved_config: str
    archive: str
    overrides: tuple[str, ...]
    end_step: int
    packing_selector: SelectionMethod | None

    def load(self) -> RunConfig:
        """Return the configuration of the replay; raises ConfigError."""
        return load_config(self.resolved_config, self.overrides)

    @classmethod
    def read(cls, path: Path) -> ReplaySpec:
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**body, "overrides": tuple(body["overrides"])})


def replay_run(path: Path, options: ReplayOptions | None = None) -> ReplayReport:
    """Train the archived steps of the run in ``path`` again and compare.

    Raises ConfigError, DataError for what cannot be replayed, RunStopped when a rank ends without success.
    """
    options = options or ReplayOptions()
    run = RunFolder.existing(path)
    steps = step_range(archived_ledger(run.archive_dir), options.first_step, options.end_step)
    changes = check_changes(options)
    folder = RunFolder(_free_folder(run))
    spec = _write_spec(run, folder, steps, options)
    if steps.first:
        _copy_checkpoint(run, folder, steps.first)
    _run_ranks(spec.load(), folder.replay_spec)
    name = f"checkpoint-{steps.end}"
    return ReplayReport(
        folder=str(folder.path),
        changes=changes,
        steps=compare_logs(run.train_log, folder.train_log, first=steps.first, end=steps.end),
        weights_equal=weights_equal(run.checkpoints_dir / name, folder.checkpoints_dir / name),
    )


def check_changes(options: ReplayOptions) -> tuple[str, ...]:
    """Return what makes the replay an experiment, as text; raises ConfigError for what is unknown."""
    changes = []
    selector = options.packing_selector
    if selector is not None:
        if selector not in SELECTION_METHODS:
            raise ConfigError(f"--packing-selector: got {selector}, expected {', '.join(SELECTION_METHODS)}")
        require_method(selector)
        changes.append(f"packing selector {selector}")
    loss_overrides(options.loss)
    return (*changes, *(f"loss {item}" for item in options.loss))


def loss_overrides(settings: Sequence[str]) -> tuple[str, ...]:
    """Return ``key=value`` loss settings as overrides of the configuration; raises ConfigError."""
    overrides = []
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or key not in (*METHOD_KEYS, "desc_ce_weight"):
            known = ", ".join((*METHOD_KEYS, "desc_ce_weight"))
            raise ConfigError(f"--loss: got {setting!r}, expected key=value with a key of {known}")
        section = "stage2_ab" if key == "desc_ce_weight" else "custom.extra.rollout_matching"
        overrides.append(f"{section}.{key}={value}")
    return tuple(overrides)


def _free_folder(run: RunFolder) -> Path:
    number = 1
    while run.replay(number).exists():
        number += 1
    run.replay(number).mkdir()
    return run.replay(number)


def _write_spec(run: RunFolder, folder: RunFolder, steps: StepRange, options: ReplayOptions) -> ReplaySpec:
    selector = next((method for method in SELECTION_METHODS if method == options.packing_selector), None)
    overrides = (
        f"run.output_dir={run.path}",
        f"run.name={folder.path.name}",
        "metrics.base_port=0",
        *loss_overrides(options.loss),
    )
    config = load_config(run.resolved_config, overrides)
    if config.model.config is not None:
        folder.model_dir.symlink_to(run.model_dir.resolve(), target_is_directory=True)
    elif (start := run.policy_version_dir(0)).is_dir():
        # the folder that the configuration names may hold another model by now
        overrides = (*overrides, f"model.name_or_path={start}")
    if run.identity.exists():
        shutil.copyfile(run.identity, folder.identity)
    spec = ReplaySpec(
        resolved_config=str(run.resolved_config),
        archive=str(run.archive_dir),
        overrides=overrides,
        end_step=steps.end,
        packing_selector=selector,
    )
    (folder.replay_spec).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")
    return spec


def _copy_checkpoint(run: RunFolder, folder: RunFolder, optimizer_step: int) -> None:
    source = run.checkpoints_dir / f"checkpoint-{optimizer_step}"
    if not source.is_dir():
        kept = ", ".join(sorted(item.name for item in run.checkpoints_dir.glob("checkpoint-*"))) or "none"
        folder.path.rmdir() if not any(folder.path.iterdir()) else shutil.rmtree(folder.path)
        raise DataError(
            f"{source}: not there, expected the checkpoint to start from (kept: {kept}); replay from step 0"
        )
    shutil.copytree(source, folder.checkpoints_dir / source.name)


def _run_ranks(config: RunConfig, spec: Path) -> None:
    world_size = config.learner_world_size
    rank = ["-m", "rollstream.history.replay_rank", str(spec)]
    launcher = [
        "-m",
        "rollstream.stack.learner_launcher",
        "--nproc_per_node",
        str(world_size),
        "--standalone",
    ]
    command = [sys.executable, "-P", *(launcher if world_size > 1 else []), *rank]
    threads = str(max(1, config.training.num_threads))
    environment = {**safe_environment(), "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise RunStopped(
            f"replay {spec.parent}: a rank ended with status {done.returncode}; its reason is above"
        )
