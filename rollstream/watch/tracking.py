"""Hands a run's numbers to trackers: steps, evaluations and the queue, read from the run folder's own logs.

It reads what the run wrote, so it may lag, fail, start late or be started again: the run never waits for it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import ConfigError
from rollstream.run_folder import JsonLinesReader, Row, RunFolder, read_json_map
from rollstream.staged_folder import write_atomically
from rollstream.watch.trackers import Numbers, TrackedRun, Tracker, check_usable, open_tracker

LOG = logging.getLogger("rollstream.tracking")
LOOK_EVERY_S: Final = 2.0
MOST_PAUSE_S: Final = 60.0
CLOSE_DEADLINE_S: Final = 60.0
SAMPLE_EVERY_MS: Final = 10_000
BATCH_ROWS: Final = 500
EVALUATION: Final = "eval_rollout_"
TrackedRow = tuple[int, int, Numbers]
Open = Callable[[str, TrackedRun], Tracker]


def step_numbers(row: Row) -> dict[str, float]:
    """Return the numbers of a row of the training log, by the names that trackers show."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in _finite(row)
        if name not in ("optimizer_step", "time_ms")
    } | {"train/is_rollout_step": float(row.get("kind") == "B")}


def evaluation_numbers(row: Row, start: str = "eval") -> dict[str, float]:
    """Return the numbers of an evaluation, by the names that trackers show."""
    return {
        f"{start}/{name.removeprefix(EVALUATION)}": value
        for name, value in _finite(row)
        if name.startswith(EVALUATION)
    }


def queue_numbers(row: Row) -> dict[str, float]:
    """Return the numbers of a sample of the stack: depths of ranks, sums over reasons."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if name in ("time_ms", "optimizer_step", "roles"):
            continue
        if isinstance(value, Mapping):
            numbers[f"queue/{name}"] = sum(number for _, number in _finite(value))
        elif isinstance(value, list):
            numbers |= {f"queue/{name}_{place}": number for place, number in _finite(dict(enumerate(value)))}
        else:
            numbers |= {f"queue/{name}": number for _, number in _finite({name: value})}
    return numbers


def _finite(row: Mapping[Any, Any]) -> Iterator[tuple[Any, float]]:
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


class RunNumbers:
    """What a run's logs say that was not handed on yet; ``state`` is where it stands in each of them."""

    def __init__(self, folder: RunFolder, state: Mapping[str, Any]) -> None:
        self._folder = folder
        self._offsets = {name: int(value) for name, value in dict(state.get("offsets", {})).items()}
        self._seen = {str(name): int(value) for name, value in dict(state.get("evaluations", {})).items()}
        self._step = int(state.get("step", 0))
        self._sampled_ms = int(state.get("sampled_ms", 0))

    @property
    def state(self) -> dict[str, Any]:
        """Return what lets another process go on here."""
        return {
            "offsets": dict(self._offsets),
            "evaluations": dict(self._seen),
            "step": self._step,
            "sampled_ms": self._sampled_ms,
        }

    def new_rows(self) -> list[TrackedRow]:
        """Return (optimizer step, time in ms, numbers) of what is new: steps, evaluations, queue."""
        rows: list[TrackedRow] = []
        for row in self._new(self._folder.train_log):
            if "loss" in row and (step := _step_of(row)) is not None:
                self._step = step
                rows.append((step, _time_of(row), step_numbers(row)))
        for row in self._new(self._folder.evaluation_log):
            if (step := _step_of(row)) is not None:
                rows.append((step, _time_of(row), evaluation_numbers(row)))
        rows += self._labelled()
        for row in self._new(self._folder.stack_samples):
            time_ms = _time_of(row)
            if time_ms - self._sampled_ms >= SAMPLE_EVERY_MS:
                self._sampled_ms = time_ms
                done = _step_of(row)
                rows.append((self._step if done is None else max(done - 1, 0), time_ms, queue_numbers(row)))
        return [row for row in rows if row[2]]

    def _new(self, path: Path) -> list[Row]:
        reader = JsonLinesReader(path, offset_bytes=self._offsets.get(path.name, 0))
        rows = reader.read_new()
        self._offsets[path.name] = reader.offset_bytes
        return rows

    def _labelled(self) -> Iterator[TrackedRow]:
        """Yield the evaluations that `rollstream eval` left, each when it is new or was written again."""
        for path in self._folder.evaluations():
            written = path.stat().st_mtime_ns
            if self._seen.get(path.name) == written:
                continue
            self._seen[path.name] = written
            body = read_json_map(path) or {}
            metrics = body.get("metrics")
            if isinstance(metrics, dict):
                numbers = evaluation_numbers(metrics, f"eval-{body.get('label') or path.stem}")
                yield max((_step_of(body) or 0) - 1, 0), written // 1_000_000, numbers


def _step_of(row: Row) -> int | None:
    step = row.get("optimizer_step")
    return step if type(step) is int else None


def _time_of(row: Row) -> int:
    found = row.get("time_ms")
    return int(found) if isinstance(found, int | float) else int(time.time() * 1000)


@dataclass
class Follower:
    """Keeps one tracker up to date; its failures are said once, waited out, and end nothing.

    What was sent is kept beside the tracker's files: started again, it goes on there.
    """

    kind: str
    folder: RunFolder
    run: TrackedRun
    open: Open = open_tracker
    num_sent: int = 0
    trouble: str = ""
    _tracker: Tracker | None = field(default=None, init=False)
    _numbers: RunNumbers | None = field(default=None, init=False)

    def step(self) -> bool:
        """Send what is new; return whether that worked. What failed is read and sent again next time."""
        state_path = self.folder.tracking_state(self.kind)
        try:
            if self._tracker is None:
                self._tracker = self.open(self.kind, self.run)
            if self._numbers is None:
                self._numbers = RunNumbers(self.folder, read_json_map(state_path) or {})
            rows = self._numbers.new_rows()
            for start in range(0, len(rows), BATCH_ROWS):
                self._tracker.send(rows[start : start + BATCH_ROWS])
            if rows:
                write_atomically(state_path, json.dumps(self._numbers.state))
            self.num_sent += len(rows)
        # a tracker's library may raise anything; none of it may end a run
        except Exception as exc:
            self._numbers = None
            self._note(f"{type(exc).__name__}: {exc}")
            return False
        self._note("")
        return True

    def follow(self, ended: threading.Event) -> None:
        """Go on until ``ended``, then send the rest and close."""
        pause_s = 0.0
        while not ended.wait(pause_s):
            pause_s = LOOK_EVERY_S if self.step() else min(max(LOOK_EVERY_S, pause_s * 2), MOST_PAUSE_S)
        self.finish()

    def finish(self) -> bool:
        """Send the rest and close; return whether all of it arrived."""
        is_whole = self.step()
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as exc:
            self._note(f"{type(exc).__name__}: {exc}")
            return False
        return is_whole

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            text = " ".join(trouble.split())[:500]
            LOG.warning("tracker %s fails, it is tried again, the run goes on: %s", self.kind, text)
        elif self.trouble and not trouble:
            LOG.info("tracker %s works again", self.kind)
        self.trouble = trouble


def followers_of(folder: RunFolder, kinds: Sequence[str], project: str) -> list[Follower]:
    """Return one follower for each kind; raises ConfigError where one is unknown or not installed."""
    check_usable(kinds)
    identity = read_json_map(folder.identity) or {}
    run = TrackedRun(
        name=folder.name,
        run_id=str(identity.get("run_id") or folder.name),
        project=project,
        folder=folder.tracking_dir,
        settings={
            str(key): str(value)
            for part in ("deciding", "settings")
            for key, value in dict(identity.get(part, {})).items()
        },
    )
    own = {kind: folder.tensorboard_dir if kind == "tensorboard" else folder.tracking_dir for kind in kinds}
    return [Follower(kind, folder, replace(run, folder=own[kind])) for kind in dict.fromkeys(kinds)]


def track_once(followers: Sequence[Follower]) -> bool:
    """Send what is there; return whether all trackers took it."""
    return all([follower.finish() for follower in followers])


def track_until(
    followers: Sequence[Follower], ended: threading.Event, *, deadline_s: float = CLOSE_DEADLINE_S
) -> bool:
    """Follow a run until ``ended``; return whether everything arrived ``deadline_s`` after that."""
    threads = [
        threading.Thread(target=follower.follow, args=(ended,), name=f"track-{follower.kind}", daemon=True)
        for follower in followers
    ]
    for thread in threads:
        thread.start()
    ended.wait()
    give_up_at = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, give_up_at - time.monotonic()))
    return not any(thread.is_alive() for thread in threads) and not any(one.trouble for one in followers)


class TrackingPlace:
    """The right to track a run: one process at a time, so that nothing is sent twice."""

    def __init__(self, folder: RunFolder) -> None:
        path = folder.tracking_lock
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, deadline_s: float) -> None:
        """Wait for the process that holds it, at most ``deadline_s``; raises ConfigError."""
        give_up_at = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < give_up_at:
                    time.sleep(0.2)
                    continue
                raise ConfigError(
                    "tracking: another process tracks this run; wait until the run is over"
                ) from None
            return
