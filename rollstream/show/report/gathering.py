"""Reads a run folder into the values of a report; what is not there is listed, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from broker_schemas.errors import DataError
from broker_schemas.records.schedule import InvalidRatio, is_rollout_step
from rollstream.history.archive_reading import ArchivedEvents
from rollstream.history.log_samples import LoggedRun, logged_run
from rollstream.run_folder import (
    JsonLinesReader,
    RunFolder,
    config_value,
    latest_steps,
    read_json_lines,
    read_json_map,
    read_resolved_config,
)
from rollstream.show.drawing import Shape
from rollstream.show.report.counting import key_numbers, number
from rollstream.show.report.data import Evaluation, Example, ReportData, Row, SumLine
from rollstream.show.report.phrases import started

_METRIC_PREFIX = "eval_rollout_"
_CLASS_NUMBERS = ("gt_objects", "pred_objects", "map_50", "map")
_BALANCED = "balanced"


def build_report(run_folder: RunFolder | Path, logged: LoggedRun | None = None) -> ReportData:
    """Return everything a report shows of a run; ``logged``: what its log tells, else read from its archive.

    A missing or unreadable file is named in ``missing``. Raises ConfigError when the path is no run folder.
    """
    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder.existing(run_folder)
    missing: list[str] = []
    config = _config(folder, missing)
    logged = logged or _archived(folder, config)
    steps = latest_steps(_steps(folder, logged, missing))
    b_ratio = _b_ratio(config)
    # a run of A steps alone has no queue: nobody sampled it, and there are no sums
    of_queue = missing if b_ratio is None or Fraction(b_ratio) > 0 else []
    samples = _samples(folder, logged, missing if folder.stack_samples.exists() else of_queue)
    evaluations = _evaluations(folder, config, missing)
    times = [value for row in (*samples, *steps) if (value := number(row, "time_ms")) is not None]
    return ReportData(
        run_name=str(config_value(config, "run", "name", default=folder.name)),
        variant=str(config_value(config, "custom", "trainer_variant", default="not known")),
        model=_model_name(config),
        started_at_ms=int(min(times)) if times else None,
        numbers=key_numbers(steps, samples, b_ratio=b_ratio),
        queue_limit=_whole(config_value(config, "stage2_async", "queue_limit")),
        steps=tuple(steps),
        samples=tuple(samples),
        evaluations=evaluations,
        audit=_audit(folder, missing if folder.audit.exists() else of_queue),
        audit_note=_audit_note(folder, steps),
        missing=tuple(missing),
    )


def sum_lines(audit: Mapping[str, Any]) -> tuple[SumLine, ...]:
    """Return the audit's map as lines: a nested map of counts becomes its sum and its parts."""
    lines: list[SumLine] = []
    for name, value in audit.items():
        title = name.replace("_", " ")
        if isinstance(value, Mapping):
            parts = [item for item in value.values() if type(item) is int]
            lines.append(SumLine(name=title, value=str(sum(parts)) if len(parts) == len(value) else ""))
            lines += [SumLine(name=str(part), value=str(item), depth=1) for part, item in value.items()]
        elif isinstance(value, list | tuple):
            lines.append(SumLine(name=title, value=str(len(value))))
            lines += [SumLine(name=str(item), value="", depth=1) for item in value]
        elif isinstance(value, bool):
            verdict = ("good" if value else "bad") if name == _BALANCED else ""
            lines.append(SumLine(name=title, value="yes" if value else "no", verdict=verdict))  # type: ignore[arg-type]
        else:
            lines.append(SumLine(name=title, value=str(value)))
    return tuple(lines)


def _config(folder: RunFolder, missing: list[str]) -> Row:
    try:
        config = read_resolved_config(folder.resolved_config)
    except DataError as exc:
        missing.append(str(exc))
        return {}
    if not config:
        missing.append(f"{folder.resolved_config.name} (variant, model, schedule)")
    return config


def _rows(path: Path, meaning: str, missing: list[str]) -> list[Row]:
    reader = JsonLinesReader(path)
    rows = reader.read_new()
    if not rows:
        missing.append(f"{path.name} ({meaning})")
    if reader.num_unreadable:
        missing.append(f"{path.name}: {reader.num_unreadable} lines could not be read and are left out")
    return rows


def _archived(folder: RunFolder, config: Row) -> LoggedRun:
    world_size = _whole(config_value(config, "devices", "learner_world_size")) or 1
    return logged_run(ArchivedEvents(folder.archive_dir), world_size)


def _steps(folder: RunFolder, logged: LoggedRun, missing: list[str]) -> list[Row]:
    if logged.steps and not folder.train_log.exists():
        return logged.steps
    return _rows(folder.train_log, "training log: no losses, no B ratio", missing)


def _samples(folder: RunFolder, logged: LoggedRun, missing: list[str]) -> list[Row]:
    """Return the samples of the log; what only `rollstream up` saw goes into the last."""
    if not logged.samples:
        return _rows(
            folder.stack_samples,
            "neither an archive nor stack samples: no depth, lag, drops or rollout rates",
            missing,
        )
    told = read_json_lines(folder.stack_samples)
    last = told[-1] if told else {}
    peak = [value for row in told if (value := _whole(row.get("broker_bytes")))]
    kept: Row = {name: last[name] for name in ("duplicates", "demand_advice", "roles") if name in last}
    kept |= {"broker_bytes": max(peak)} if peak else {}
    return [*logged.samples[:-1], logged.samples[-1] | kept]


def _b_ratio(config: Row) -> str | None:
    if config_value(config, "custom", "trainer_variant") == "rollout_matching_sft":
        return "1"
    value = config_value(config, "stage2_ab", "schedule", "b_ratio")
    if value is None:
        return None
    try:
        is_rollout_step(0, str(value))
    except InvalidRatio:
        return None
    return str(value)


def _model_name(config: Row) -> str:
    name = config_value(config, "model", "name_or_path")
    if name:
        return str(name)
    return "tiny, from an inline config" if config_value(config, "model", "config") else "not known"


def _evaluations(folder: RunFolder, config: Row, missing: list[str]) -> tuple[Evaluation, ...]:
    found = []
    for path in folder.evaluations():
        try:
            content = read_json_map(path)
        except DataError as exc:
            missing.append(str(exc))
            continue
        if content is not None:
            found.append(_evaluation(content, path.stem.removeprefix("evaluation-"), _data_root(config)))
    if not found:
        missing.append("evaluation-<label>.json (precision, recall, F1, example images)")
    return tuple(sorted(found, key=_evaluation_order))


def _evaluation_order(item: Evaluation) -> tuple[bool, float, bool, str]:
    """Sort by how far the run was: what was evaluated beyond ``after`` comes behind it."""
    is_after = item.label == "after"
    unknown = math.inf if is_after else -1
    step = item.optimizer_step if item.optimizer_step is not None else unknown
    return (item.label != "before", step, is_after, item.label)


def _evaluation(content: Row, label: str, data_root: Path | None) -> Evaluation:
    metrics = content.get("metrics")
    known = metrics if isinstance(metrics, Mapping) else {}
    listed = content.get("examples")
    examples = [
        _example(item, data_root)
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, Mapping)
    ]
    return Evaluation(
        label=str(content.get("label", label)),
        optimizer_step=_whole(content.get("optimizer_step")),
        metrics={
            str(name).removeprefix(_METRIC_PREFIX): value
            for name in known
            if (value := number(known, name)) is not None
        },
        examples={example.sample_id: example for example in examples},
        gate=number(content, "maskiou_gate"),
        classes=_classes(content.get("classes")),
    )


def _classes(found: object) -> dict[str, dict[str, float]]:
    return {
        str(name): {key: value for key in _CLASS_NUMBERS if (value := number(numbers, key)) is not None}
        for name, numbers in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(numbers, Mapping)
    }


def _example(item: Mapping[str, Any], data_root: Path | None) -> Example:
    paths = [str(item["image_path"])] if item.get("image_path") else []
    if item.get("image") and data_root is not None:
        paths.append(str(data_root / str(item["image"])))
    ground_truth, _ = _shapes(item.get("ground_truth"))
    predictions, num_undrawable = _shapes(item.get("predictions"))
    return Example(
        sample_id=str(item.get("sample_id", "?")),
        image_paths=tuple(paths),
        ground_truth=ground_truth,
        predictions=predictions,
        num_undrawable=num_undrawable,
        rollout_text=str(item.get("rollout_text", "")),
        is_invalid=bool(item.get("is_invalid", False)),
        truncated=bool(item.get("truncated", False)),
    )


def _shapes(items: object) -> tuple[tuple[Shape, ...], int]:
    listed: Sequence[object] = items if isinstance(items, list) else []
    drawn = [Shape.from_map(item) if isinstance(item, Mapping) else None for item in listed]
    shapes = tuple(shape for shape in drawn if shape is not None)
    return shapes, len(listed) - len(shapes)


def _data_root(config: Row) -> Path | None:
    root = config_value(config, "data", "root")
    if root:
        return Path(str(root))
    data_file = config_value(config, "data", "val_jsonl") or config_value(config, "data", "train_jsonl")
    return Path(str(data_file)).parent if data_file else None


def _audit(folder: RunFolder, missing: list[str]) -> tuple[SumLine, ...]:
    try:
        content = read_json_map(folder.audit)
    except DataError as exc:
        missing.append(str(exc))
        return ()
    if content is None:
        missing.append("audit.json (the sums; run `rollstream audit` on this folder)")
        return ()
    return sum_lines(content)


def _audit_note(folder: RunFolder, steps: Sequence[Row]) -> str:
    """Say of when the audit is: its sums stand beside numbers of a run that may have gone on since."""
    try:
        written_ms = int(folder.audit.stat().st_mtime * 1000)
    except OSError:
        return ""
    num_since = sum((number(row, "time_ms") or 0) > written_ms for row in steps)
    since = f"; trained since: {num_since} steps, run `rollstream audit` on this folder again"
    return f"as of {started(written_ms)}" + (since if num_since else "")


def _whole(value: object) -> int | None:
    return value if type(value) is int else None
