"""Checkpoints written beside training: copied at the step, written by threads, then settled [L-6].

A rank writes its own files. When all have, rank 0 adds what belongs to nobody and moves the folder into
place; before that moment the checkpoint is not there.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save

from broker_schemas.errors import RunStopped
from broker_schemas.method.adapter_folder import write_adapter
from learner.checkpoint_contents import INDEX_FILE, RankContents, copy_contents, weight_index
from learner.checkpoint_storage import TENSORS, BlockPlanner, BlockWriter, with_one_process_expected
from learner.checkpoints import PREFIX, TrainerState, write_model_config, write_small_files
from learner.checksums import write_checksums
from learner.companions import Companions
from learner.distributed import Ranks
from learner.tensor_files import WrittenFile
from learner.trained_weights import TrainedWeights
from learner.whole_directory import keep_last, new_staging, put_in_place, refusals_named

LOG = logging.getLogger("rollstream.learner")
_LOOK_AGAIN_S: Final = 0.02
# a checkpoint that was nearly there when the run failed may still be finished
_LEAVE_WITHIN_S: Final = 20.0


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """Where checkpoints go, whose tokenizer and processor files go with them, and how many are kept."""

    parent: Path
    companions: Companions
    num_kept: int


@dataclass(frozen=True, kw_only=True)
class CheckpointTimes:
    """Seconds since they were last taken: ``held_s`` of training, ``durable_s`` of checkpoints finished."""

    held_s: float
    durable_s: float


@dataclass(frozen=True, kw_only=True)
class _Write:
    state: TrainerState
    final: Path
    staging: Path
    started: float
    contents: RankContents
    random_state: torch.Tensor
    weight_index: dict[str, Any] | None


class CheckpointWriter:
    """Writes one checkpoint at a time; every method but ``close`` is called by all ranks in the same order.

    ``confirm`` and ``settle`` are called on rank 0, from its writing thread: before the folder is moved into
    place, and with the steps it covers once it is durable.
    """

    def __init__(
        self,
        place: CheckpointPlace,
        *,
        trained: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        clock: Callable[[], float],
        confirm: Callable[[], None] = lambda: None,
        settle: Callable[[int], None] = lambda optimizer_step: None,
    ) -> None:
        self._place = place
        self._trained = trained
        self._optimizer = optimizer
        self._ranks = ranks
        self._clock = clock
        self._confirm = confirm
        self._settle = settle
        self._running: Future[None] | None = None
        self._is_leaving = threading.Event()
        self._held_s = 0.0
        self._durable_s: list[float] = []

    def start(self, state: TrainerState) -> None:
        """Copy what this rank saves and begin to write it; a checkpoint in writing is waited for.

        Raises RunStopped when the disk refuses, or refused the checkpoint before.
        """
        self.wait()
        started = self._clock()
        final = self._place.parent / f"{PREFIX}{state.optimizer_step}"
        what = f"begin of {final.name}"
        mark = self._ranks.broadcast(f"-{uuid.uuid4().hex[:8]}", what=what)
        staging = final.parent / f".writing-{final.name}{mark}"
        if self._ranks.is_first:
            self._confirm()
            staging = new_staging(final, mark)
        self._ranks.barrier(what=what)
        contents = copy_contents(
            self._trained, self._optimizer, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        write = _Write(
            state=state,
            final=final,
            staging=staging,
            started=started,
            contents=contents,
            random_state=torch.get_rng_state(),
            weight_index=weight_index(self._trained, self._ranks.world_size),
        )
        writer = BlockWriter(staging, contents.blocks)
        with_one_process_expected()
        blocks = async_save(
            {TENSORS: contents.tensors},
            storage_writer=writer,
            planner=BlockPlanner(contents.blocks),
            async_stager=_Copied(),
            no_dist=True,
        )
        assert isinstance(blocks, Future), "what is copied already is not staged in the background"
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = pool.submit(self._finish, write, writer, blocks)
        pool.shutdown(wait=False)
        self._held_s += self._clock() - started

    def wait(self) -> None:
        """Return when no checkpoint is in writing on any rank, however long that takes; raises RunStopped."""
        running = self._running
        if running is None:
            return
        started = self._clock()
        self._ranks.wait_for_all(running.result, what="end of the writing of a checkpoint")
        self._running = None
        self._held_s += self._clock() - started

    def is_free(self, *, within_s: float) -> bool:
        """Return whether no rank is writing, waiting ``within_s`` at most for those that are.

        Raises RunStopped when the disk refused.
        """
        if self._running is None:
            return True
        started = self._clock()
        wait([self._running], timeout=within_s)
        self.raise_failure()
        are_done = all(self._ranks.gather(self._running.done(), what="state of a checkpoint"))
        self._running = None if are_done else self._running
        self._held_s += self._clock() - started
        return are_done

    def raise_failure(self) -> None:
        """Raise RunStopped if this rank's part of a checkpoint could not be written; waits for nothing."""
        if self._running is not None and self._running.done():
            self._running.result()

    def take_times(self) -> CheckpointTimes:
        """Return the seconds since the last call."""
        held_s, self._held_s = self._held_s, 0.0
        # appended to by the writing thread meanwhile
        durable_s = sum(self._durable_s.pop() for _ in range(len(self._durable_s)))
        return CheckpointTimes(held_s=held_s, durable_s=durable_s)

    def close(self) -> None:
        """Let a checkpoint in writing end, if that takes seconds; safe to call twice."""
        if self._running is not None:
            wait([self._running], timeout=_LEAVE_WITHIN_S)
        self._is_leaving.set()

    def _finish(self, write: _Write, writer: BlockWriter, blocks: Future[Any]) -> None:
        key = f"{write.staging.name}"
        try:
            with refusals_named(write.final):
                _result(blocks)
            files = {name: asdict(written) for name, written in writer.written.items()}
        except RunStopped as stop:
            self._ranks.post(key, {"stop": str(stop)})
            self._discard(write)
            raise
        self._ranks.post(key, {"files": files})
        if self._ranks.is_first:
            try:
                self._complete(write, files if self._ranks.world_size == 1 else self._files_of_all(key))
            finally:
                self._discard(write)

    def _files_of_all(self, key: str) -> dict[str, Any]:
        """Return the files of every rank once all are written; raises RunStopped for one that failed."""
        while True:
            posted = self._ranks.posted(key)
            for body in posted.values():
                if "stop" in body:
                    raise RunStopped(body["stop"])
            if len(posted) == self._ranks.world_size:
                return {name: file for body in posted.values() for name, file in body["files"].items()}
            if self._is_leaving.wait(_LOOK_AGAIN_S):
                raise RunStopped("a checkpoint was given up: a rank did not write its part before it left")

    def _complete(self, write: _Write, files: dict[str, Any]) -> None:
        with refusals_named(write.final):
            self._write_description(write)
            write_small_files(write.staging, write.state, self._place.companions, write.random_state)
            if write.weight_index is not None:
                text = json.dumps(write.weight_index, indent=1) + "\n"
                (write.staging / INDEX_FILE).write_text(text, encoding="utf-8")
            write_checksums(write.staging, {name: WrittenFile(**file) for name, file in files.items()})
        self._confirm()
        put_in_place(write.staging, write.final)
        keep_last(self._place.parent, PREFIX, self._place.num_kept, also=write.state.best_step)
        self._settle(write.state.optimizer_step)
        taken_s = self._clock() - write.started
        self._durable_s.append(taken_s)
        LOG.info("checkpoint after step %d: durable after %.3f s", write.state.optimizer_step - 1, taken_s)

    def _write_description(self, write: _Write) -> None:
        if self._trained.adapter is None:
            write_model_config(self._trained.model, write.staging)
            return
        try:
            write_adapter(write.staging, self._trained.adapter, write.contents.adapter)
        except SafetensorError as exc:  # a full disk comes as the library's own error
            raise OSError(str(exc)) from exc

    def _discard(self, write: _Write) -> None:
        if self._ranks.is_first:
            shutil.rmtree(write.staging, ignore_errors=True)


class _Copied(AsyncStager):
    """Stages nothing: the tensors are copies already."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        """Nothing is waited for."""

    def close(self) -> None:
        """Nothing is held."""


def _result(blocks: Future[Any]) -> None:
    try:
        blocks.result()
    except CheckpointException as exc:
        raise next(iter(exc.failures.values()))[0] from exc
