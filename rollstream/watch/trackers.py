"""Trackers: TensorBoard, Weights & Biases and MLflow behind one port, each an extra, imported when used.

They only receive numbers; who reads them from a run, and what a failure means, is known elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from broker_schemas.errors import ConfigError

Numbers = Mapping[str, float]
MODULES: Final = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
MLFLOW_BATCH: Final = 900  # its servers take 1,000 numbers and 100 parameters a call
MLFLOW_PARAMETERS: Final = 100
MLFLOW_TEXT: Final = 500
MLFLOW_ADDRESS: Final = "MLFLOW_TRACKING_URI"
STEP: Final = "optimizer_step"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run; ``run_id`` is the run's own, so that a resumed run is the same one.

    ``folder`` is the tracker's own, for what it keeps on disk; ``settings`` are the run's, flat.
    """

    name: str
    run_id: str
    project: str
    folder: Path
    settings: Mapping[str, str]


class Tracker(Protocol):
    """The port: numbers of optimizer steps, in the order in which the run wrote them."""

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        """Send (optimizer step, time in ms, numbers by name); raises whatever its library raises."""

    def close(self) -> None:
        """Send what waits, and end."""


def open_tracker(kind: str, run: TrackedRun) -> Tracker:
    """Return the tracker of a kind, connected; raises ConfigError, and whatever its library raises."""
    check_usable([kind])
    run.folder.mkdir(parents=True, exist_ok=True)
    opened: dict[str, Callable[[TrackedRun], Tracker]] = {
        "tensorboard": TensorBoardTracker,
        "wandb": WandbTracker,
        "mlflow": MlflowTracker,
    }
    return opened[kind](run)


def check_usable(kinds: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that does not exist, lacks its library, or its server's address."""
    for kind in kinds:
        if kind not in MODULES:
            raise ConfigError(f"tracker: got {kind!r}, expected one of {', '.join(sorted(MODULES))}")
        if importlib.util.find_spec(MODULES[kind]) is None:
            raise ConfigError(
                f"tracker {kind}: its library is not installed in this environment; install it with "
                f"pip install 'rollstream[{kind}]', or take it out of tracking.to"
            )
    if "mlflow" in kinds and not os.environ.get(MLFLOW_ADDRESS):
        raise ConfigError(
            f"tracker mlflow: environment variable {MLFLOW_ADDRESS} is not set, expected the address of an "
            "MLflow server, such as http://localhost:5000"
        )


class TensorBoardTracker:
    """Event files that ``tensorboard --logdir`` shows; steps that are repeated replace the earlier ones."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._writer = EventFileWriter(str(run.folder))
        self._highest = -1

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        for step, time_ms, numbers in rows:
            if "train/loss" in numbers:
                if step <= self._highest:
                    self._restart(step, time_ms)
                self._highest = step
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            self._writer.add_event(
                self._event(step=step, wall_time=time_ms / 1000, summary=self._summary(value=values))
            )
        self._writer.flush()

    def _restart(self, step: int, time_ms: int) -> None:
        start = self._session(status=self._session.START)
        self._writer.add_event(self._event(step=step, wall_time=time_ms / 1000, session_log=start))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; offline in the run's folder where no key is known, for ``wandb sync`` later."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        self._run: Any = wandb.init(
            project=run.project,
            id=run.run_id,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            mode=mode,
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # steps may be repeated, and evaluations come late: the step is a number among the others
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        for step, _, numbers in rows:
            self._run.log({STEP: step, **numbers})

    def close(self) -> None:
        self._run.finish()


def _wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        is_in_file = "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        is_in_file = False
    return bool(os.environ.get("WANDB_API_KEY")) or is_in_file


class MlflowTracker:
    """A run of the MLflow server or store that the environment variable MLFLOW_TRACKING_URI names."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=os.environ[MLFLOW_ADDRESS])
        found = self._client.get_experiment_by_name(run.project)
        experiment = self._client.create_experiment(run.project) if found is None else found.experiment_id
        self._run_id = self._known(experiment, run) or self._created(experiment, run)

    def _known(self, experiment: str, run: TrackedRun) -> str | None:
        wanted = f"tags.rollstream_run = '{run.run_id}'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _created(self, experiment: str, run: TrackedRun) -> str:
        from mlflow.entities import Param

        tags = {"rollstream_run": run.run_id}
        run_id: str = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        params = [Param(name, text[:MLFLOW_TEXT]) for name, text in sorted(run.settings.items())]
        for start in range(0, len(params), MLFLOW_PARAMETERS):
            self._client.log_batch(run_id, params=params[start : start + MLFLOW_PARAMETERS])
        return run_id

    def send(self, rows: Sequence[tuple[int, int, Numbers]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, time_ms or int(time.time() * 1000), step)
            for step, time_ms, numbers in rows
            for name, value in numbers.items()
        ]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MLFLOW_BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
