"""The folder of one run: the name of every file in it, and readers that forgive a process killed mid-write.

Owns names and reading. It must not know what the numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_schemas.errors import ConfigError, DataError

Row = dict[str, Any]
_EVALUATION_PREFIX = "evaluation-"


@dataclass(frozen=True)
class RunFolder:
    """Names inside ``path``, the folder ``runs/<name>``; building one touches no disk."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Return the folder at ``path``; raises ConfigError when it is not there or not a run's folder."""
        if not path.exists():
            raise ConfigError(f"run folder {path}: not found; give the folder of a run, such as runs/<name>")
        if not path.is_dir():
            raise ConfigError(f"run folder {path}: got a file, expected the folder of a run (runs/<name>)")
        folder = cls(path)
        known = (folder.resolved_config, folder.train_log, folder.stack_samples, folder.logs_dir)
        if not any(item.exists() for item in known) and not folder.evaluations():
            raise ConfigError(
                f"run folder {path}: holds none of {', '.join(item.name for item in known)}; "
                "give the folder of one run (runs/<name>), not the one above or below it"
            )
        return folder

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def resolved_config(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def identity(self) -> Path:
        return self.path / "identity.json"

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"

    def role_log(self, role: str, index: int) -> Path:
        """Return the log of one process, ``logs/<role>-<n>.log``."""
        return self.logs_dir / f"{role}-{index}.log"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    def latest_checkpoint(self) -> int | None:
        """Return how many optimizer steps the latest whole checkpoint covers, None without one."""
        numbers = (
            path.name.removeprefix("checkpoint-") for path in self.checkpoints_dir.glob("checkpoint-*")
        )
        return max((int(number) for number in numbers if number.isdecimal()), default=None)

    @property
    def policy_dir(self) -> Path:
        return self.path / "policy"

    def policy_version_dir(self, policy_version: int) -> Path:
        """Return the folder of one published policy, ``policy/v<N>``."""
        return self.policy_dir / f"v{policy_version}"

    @property
    def archive_dir(self) -> Path:
        return self.path / "archive"

    @property
    def redis_dir(self) -> Path:
        return self.path / "redis"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def broker(self) -> Path:
        return self.path / "broker.json"

    @property
    def train_log(self) -> Path:
        return self.path / "train_log.jsonl"

    @property
    def evaluation_log(self) -> Path:
        return self.path / "evaluation_log.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tracking_dir(self) -> Path:
        """What trackers keep on disk, and how far each of them is."""
        return self.path / "tracking"

    def tracking_state(self, kind: str) -> Path:
        return self.tracking_dir / f"{kind}.json"

    @property
    def tracking_lock(self) -> Path:
        return self.tracking_dir / "tracking.lock"

    @property
    def model_dir(self) -> Path:
        """The start model of a run whose configuration describes one instead of naming it."""
        return self.path / "model"

    @property
    def smoke_dir(self) -> Path:
        return self.path / "smoke"

    def parse_failures(self, matcher_index: int) -> Path:
        """Return the dump of one matcher, ``parse_failures-<n>.jsonl``."""
        return self.path / f"parse_failures-{matcher_index}.jsonl"

    def replay(self, number: int) -> Path:
        """Return the folder of one replay, ``replay-<n>``; it is a run folder of its own."""
        return self.path / f"replay-{number}"

    @property
    def replay_spec(self) -> Path:
        """What a replay's ranks read; only a replay's own folder has it."""
        return self.path / "replay.json"

    @property
    def learner_lock(self) -> Path:
        return self.path / "learner.lock"

    @property
    def stack_lock(self) -> Path:
        return self.path / "stack.lock"

    @property
    def stack_samples(self) -> Path:
        return self.path / "stack_samples.jsonl"

    @property
    def untrainable(self) -> Path:
        """Return the list of samples that the run leaves out, with reasons."""
        return self.path / "untrainable.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    def evaluation(self, label: str) -> Path:
        """Return the file of one evaluation, ``evaluation-<label>.json``."""
        return self.path / f"{_EVALUATION_PREFIX}{label}.json"

    def evaluations(self) -> tuple[Path, ...]:
        """Return the evaluation files that exist, by name."""
        return tuple(sorted(self.path.glob(f"{_EVALUATION_PREFIX}*.json")))


class JsonLinesReader:
    """Reads what was appended to a JSON Lines file since the last call.

    A last line without its line break is left for later: its writer may be in the middle of it, or dead.
    A complete line that is no map is skipped and counted in ``num_unreadable``: a writer that was killed and
    started again leaves one. A file that shrank was replaced and is read from its start.
    """

    def __init__(self, path: Path, *, offset_bytes: int = 0) -> None:
        self._path = path
        self.offset_bytes = offset_bytes
        self.num_unreadable = 0

    def read_new(self) -> list[Row]:
        """Return the new rows in file order; none for a missing or unchanged file."""
        try:
            with self._path.open("rb") as stream:
                size_bytes = stream.seek(0, 2)
                if size_bytes < self.offset_bytes:
                    self.offset_bytes = 0
                stream.seek(self.offset_bytes)
                raw = stream.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self.offset_bytes += len(whole)
        return self._rows(whole)

    def _rows(self, whole: bytes) -> list[Row]:
        rows = []
        for line in whole.splitlines():
            if not line.strip():
                continue
            row = _map_or_none(line)
            if row is None:
                self.num_unreadable += 1
            else:
                rows.append(row)
        return rows


def read_json_lines(path: Path) -> list[Row]:
    """Return every readable map of a JSON Lines file, without a torn last line; empty when missing."""
    return JsonLinesReader(path).read_new()


def read_json_map(path: Path) -> Row | None:
    """Return the map in a JSON file, None when the file is missing; raises DataError for anything else."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    found = _map_or_none(raw)
    if found is None:
        raise DataError(
            f"{path}: got {len(raw)} bytes that are no JSON map; delete the file or write it again"
        )
    return found


def read_resolved_config(path: Path) -> Row:
    """Return the resolved configuration as a map, empty when missing; raises DataError when it is no map."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise DataError(
            f"{path}: not readable as YAML ({exc}); write it again from the run's config"
        ) from exc
    if not isinstance(found, dict):
        raise DataError(f"{path}: got {type(found).__name__}, expected a map of sections")
    return found


def latest_steps(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each optimizer step, rising, as the learner went on from it.

    A resumed learner writes steps again: the last row of a step counts, and steps above it that were written
    before it were lost with the process. Rows without an integer ``optimizer_step`` are left out.
    """
    by_step: dict[int, Row] = {}
    highest = -1
    for row in rows:
        optimizer_step = row.get("optimizer_step")
        if type(optimizer_step) is not int:
            continue
        if optimizer_step <= highest:
            by_step = {known: kept for known, kept in by_step.items() if known < optimizer_step}
        by_step[optimizer_step] = row
        highest = optimizer_step
    return [by_step[optimizer_step] for optimizer_step in sorted(by_step)]


def config_value(config: Mapping[str, Any], *keys: str, default: object = None) -> Any:
    """Return the value under nested ``keys``, ``default`` where a level is missing or no map."""
    found: Any = config
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return default
        found = found[key]
    return found


def _map_or_none(raw: bytes) -> Row | None:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
