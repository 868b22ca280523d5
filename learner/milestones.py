"""What happens between steps: resume, publish, evaluate, checkpoint; mostly rank 0, at all ranks' pace."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from broker_schemas.errors import RunStopped
from learner import checkpoints, weights
from learner.checkpoint_writing import CheckpointPlace, CheckpointWriter
from learner.checkpoints import TrainerState
from learner.distributed import Ranks
from learner.early_stopping import note_evaluation, stop_reason, watched_value
from learner.metrics import LearnerMetrics
from learner.ports import Evaluate, ReadEvaluations, SyncServers
from learner.settings import LearnerSettings
from learner.step_report import LogRow
from learner.step_rows import RowSources
from learner.stop_request import StopRequest
from learner.trained_weights import TrainedWeights, unsharded_copy
from learner.training_log import TrainingLog
from learner.whole_directory import remove_leftovers

LOG = logging.getLogger("rollstream.learner")
# a disk that is slower than this no longer holds training up
_PATIENCE_WITH_DISK_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class LearnerParts:
    """What the wiring hands to the loop of one rank.

    ``log``, ``evaluation_log`` and ``evaluate`` are used on rank 0 alone and may be None elsewhere, as is
    ``read_evaluations``, which is there where others evaluate beside training.
    ``sync_servers`` is called on rank 0 with a policy version and its folder before that version is
    published. ``confirm`` is called on rank 0 before files are written; it raises PlaceTaken once another
    learner has this run. ``on_step`` is called on rank 0 with each row of the training log.
    """

    model: Any
    ranks: Ranks
    sources: RowSources
    metrics: LearnerMetrics
    stop: StopRequest
    log: TrainingLog | None = None
    evaluation_log: TrainingLog | None = None
    evaluate: Evaluate | None = None
    read_evaluations: ReadEvaluations | None = None
    sync_servers: SyncServers | None = None
    on_step: Callable[[LogRow], None] = lambda row: None
    confirm: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


class Milestones:
    """Every method is called by all ranks, in the same order."""

    def __init__(
        self,
        parts: LearnerParts,
        settings: LearnerSettings,
        trained: TrainedWeights,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._ranks = parts.ranks
        self._broker = parts.sources.broker
        self._trained = trained
        self._optimizer = optimizer
        self._covered_step = -1
        self._is_overdue = False
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._writer = CheckpointWriter(
            CheckpointPlace(
                parent=settings.checkpoints_dir,
                companions=settings.companions,
                num_kept=settings.num_checkpoints_kept,
            ),
            trained=trained,
            optimizer=optimizer,
            ranks=parts.ranks,
            clock=parts.clock,
            confirm=parts.confirm,
            settle=self._settle,
        )

    def resume(self) -> TrainerState:
        """Load the latest checkpoint that rank 0 sees, if there is one; return where the run stands."""
        found = None
        if self._ranks.is_first:
            for folder in (self._settings.checkpoints_dir, self._settings.policy_dir):
                remove_leftovers(folder)
            latest = checkpoints.latest_checkpoint(self._settings.checkpoints_dir)
            found = None if latest is None else latest.name
        name = self._ranks.broadcast(found, what="choice of the checkpoint to resume from")
        if name is None:
            return TrainerState(optimizer_step=0)
        path = self._settings.checkpoints_dir / name
        state, started = checkpoints.read_trainer_state(path), self._parts.clock()
        self._check_owner(path, state)
        self._ranks.wait_for_all(lambda: self._restore(path), what=f"loading of {name}")
        self._covered_step = state.optimizer_step
        self._seconds["load_s"] = self._parts.clock() - started
        if self._ranks.is_first:
            # a kill between writing a checkpoint and settling it left the claims open
            self._broker.settle_checkpoint(optimizer_step=state.optimizer_step)
        LOG.info("resumed from %s at optimizer step %d", path, state.optimizer_step)
        return state

    def _restore(self, path: Path) -> None:
        checkpoints.restore_checkpoint(
            path,
            self._trained,
            self._optimizer,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )

    def _check_owner(self, path: Path, state: TrainerState) -> None:
        ours = self._settings.run_id
        if state.run_id and ours and state.run_id != ours:
            raise RunStopped(
                f"{path}: a checkpoint of run {state.run_id}, expected one of this run, {ours}; take it out "
                "of this folder, or start from its weights with model.name_or_path"
            )

    def publish_if_due(self, state: TrainerState) -> None:
        """Publish after each ``sync_every_steps`` steps [V-6]."""
        if weights.is_publication_due(state.optimizer_step, self._settings.sync_every_steps):
            self.publish(state)

    def publish(self, state: TrainerState) -> None:
        """Publish the current policy version: barrier, publish, barrier [V-2]."""
        settings = self._settings
        policy_version = weights.policy_version_at(state.optimizer_step, settings.sync_every_steps)
        if not settings.is_policy_published:
            return
        what = f"publication of policy version {policy_version}"
        self._ranks.barrier(what=f"start of the {what}")
        tensors = self._trained.whole_tensors(keep=self._ranks.is_first) if self._trained.is_sharded else None

        def write() -> None:
            started = self._parts.clock()
            self._parts.confirm()
            path = weights.kept_policy(
                settings.policy_dir, policy_version, state.optimizer_step, settings.sync_every_steps
            ) or weights.publish_weights(
                settings.policy_dir,
                trained=self._trained,
                tensors=tensors,
                policy_version=policy_version,
                companions=settings.companions,
                num_kept=settings.num_policies_kept,
                dtype=settings.publication_dtype,
            )
            written_s = self._parts.clock() - started
            if self._parts.sync_servers is not None:
                self._parts.sync_servers(policy_version, str(path))
            self._broker.publish_policy(
                policy_version=policy_version, optimizer_step=state.optimizer_step, weights_path=str(path)
            )
            taken_s = self._parts.clock() - started
            self._seconds["publication_s"] += written_s
            self._seconds["sync_s"] += taken_s - written_s
            LOG.info("%s: written in %.3f s, current after %.3f s", what, written_s, taken_s)

        self._ranks.wait_for_first(write, what=f"end of the {what}")
        self._parts.metrics.on_policy_published(policy_version)

    def evaluate_if_due(self, state: TrainerState) -> tuple[TrainerState, str | None]:
        """Evaluate where it is due; return the state after it and why the run ends, None when it goes on."""
        settings, done = self._settings, state.optimizer_step
        if settings.is_evaluated_by_others:
            return self._note_others(state)
        is_due = settings.eval_every_steps > 0 and (
            done % settings.eval_every_steps == 0 or done == settings.max_steps
        )
        if not is_due:
            return state, None
        results: dict[str, float] = {}
        model = self._whole_model()
        if self._ranks.is_first and self._parts.evaluate is not None:
            results = self._parts.evaluate(model, done)
            model.train()
            if self._parts.evaluation_log is not None:
                self._parts.evaluation_log.write({"optimizer_step": done - 1, **results})
        what = f"evaluation after optimizer step {done - 1}"
        results = self._ranks.broadcast(results, what=what, timeout_s=settings.evaluation_timeout_s)
        self._parts.metrics.on_evaluation(results)
        if not results:
            return state, None
        metric = settings.early_stop.metric
        value = watched_value(results, metric)
        noted = note_evaluation(state, value, metric)
        return noted, stop_reason(noted, value, settings.early_stop)

    def _note_others(self, state: TrainerState) -> tuple[TrainerState, str | None]:
        """Take what others found out since the last look, where weights were published; no wait."""
        settings = self._settings
        is_watched = settings.early_stop.target is not None or settings.early_stop.patience is not None
        if not is_watched or not weights.is_publication_due(state.optimizer_step, settings.sync_every_steps):
            return state, None
        found: Sequence[tuple[int, dict[str, float]]] = ()
        if self._ranks.is_first and self._parts.read_evaluations is not None:
            found = self._parts.read_evaluations(state.evaluated_step)
        found = self._ranks.broadcast(found, what=f"evaluations by optimizer step {state.optimizer_step - 1}")
        metric = settings.early_stop.metric
        for evaluated_step, results in found:
            value = watched_value(results, metric)
            state = replace(
                note_evaluation(state, value, metric, at_step=evaluated_step), evaluated_step=evaluated_step
            )
            reason = stop_reason(state, value, settings.early_stop)
            if reason is not None:
                return state, f"{reason} (after {evaluated_step} steps)"
        return state, None

    def _whole_model(self) -> Any:
        """Return a model that rank 0 can run by itself: what is trained, or a copy of all its shards."""
        if not self._trained.is_sharded:
            return self._trained.model
        tensors = self._trained.whole_tensors(keep=self._ranks.is_first, with_base=True)
        if not self._ranks.is_first:
            return None
        dtype = self._settings.publication_dtype or torch.float32
        return unsharded_copy(self._trained, tensors, dtype).to(self._ranks.device)

    def checkpoint_if_due(self, state: TrainerState) -> None:
        """Begin a checkpoint after each ``save_every_steps`` steps, and after the best evaluation so far.

        While the one before is still in writing a regular one is put off, and training goes on.
        """
        every = self._settings.save_every_steps
        is_best = state.best_step == state.optimizer_step
        is_due = every > 0 and state.optimizer_step % every == 0
        self._is_overdue |= is_due
        self._writer.raise_failure()
        patience_s = _PATIENCE_WITH_DISK_S if is_due else 0.0
        if is_best or (self._is_overdue and self._writer.is_free(within_s=patience_s)):
            self._begin_checkpoint(state)

    def checkpoint(self, state: TrainerState) -> None:
        """Write a checkpoint unless one covers this step; return once it is durable [Q-10]."""
        self._begin_checkpoint(state)
        self._writer.wait()

    def take_seconds(self) -> LogRow:
        """Return the seconds since the last call: of loading a checkpoint, of writing policies and handing
        them to the servers, of checkpoints until durable, and how long they held training up [L-11].
        """
        seconds, self._seconds = self._seconds, defaultdict(float)
        times = self._writer.take_times()
        return {
            **{name: seconds[name] for name in ("load_s", "publication_s", "sync_s")},
            "checkpoint_s": times.durable_s,
            "checkpoint_held_s": times.held_s,
        }

    def close(self) -> None:
        """Let go of a checkpoint in writing; safe to call twice."""
        self._writer.close()

    def _begin_checkpoint(self, state: TrainerState) -> None:
        self._is_overdue = False
        if state.optimizer_step != self._covered_step:
            self._writer.start(replace(state, run_id=self._settings.run_id))
            self._covered_step = state.optimizer_step

    def _settle(self, optimizer_step: int) -> None:
        self._broker.settle_checkpoint(optimizer_step=optimizer_step)
        self._parts.metrics.on_checkpoint(optimizer_step)
