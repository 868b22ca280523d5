"""Which samples of a run cannot be trained or shown: found before it starts, refused or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.trainability import (
    REASONS,
    SampleProblem,
    SampleReport,
    SampleRuler,
    count_reasons,
    examine_samples,
)
from configs import RunConfig
from rollstream.run_folder import read_json_map
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access

MAX_SHOWN: Final = 10
Untrainable = Mapping[str, tuple[SampleProblem, ...]]
"""Problems by the path of the data set, as the configuration writes it."""


def sample_ruler(config: RunConfig) -> SampleRuler:
    """Return what measures samples in the run's model; raises DataError for a folder that lacks files."""
    folder = access.model_dir(config)
    bounds = config.model.image
    grid = ImageGrid.of_model(folder, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    return SampleRuler(access.prompt_builder(config, folder), grid)


def examine_dataset(
    config: RunConfig, jsonl: str, ruler: SampleRuler | None, *, is_thorough: bool = False
) -> SampleReport:
    """Return problems and lengths of one data set of the run; length is a problem for training alone.

    ``ruler`` None: pictures and lines alone are looked at. Raises DataError for lines that break the format.
    """
    passed_over: dict[str, str] = {}
    samples = access.read_whole(config, jsonl, passed_over=passed_over)
    is_training = jsonl == config.data.train_jsonl
    limit = config.training.global_max_length if is_training else None
    report = examine_samples(samples, ruler, max_length=limit, is_thorough=is_thorough)
    lines = tuple(
        SampleProblem(sample_id=sample_id, reason="control_token", detail=detail)
        for sample_id, detail in passed_over.items()
    )
    return SampleReport(
        num_samples=report.num_samples + len(lines),
        problems=(*lines, *report.problems),
        lengths=report.lengths,
    )


def find_untrainable(config: RunConfig) -> Untrainable:
    """Return the samples that a run leaves out, by data set.

    Raises DataError where there are some and ``data.skip_untrainable`` is off, or where none would be left.
    """
    ruler = sample_ruler(config)
    paths = [path for path in (config.data.train_jsonl, config.data.val_jsonl) if path is not None]
    reports = {path: examine_dataset(config, path, ruler) for path in dict.fromkeys(paths)}
    for path, report in reports.items():
        if report.problems and not config.data.skip_untrainable:
            raise DataError(_refusal(path, report))
        if report.num_samples == len(report.problems):
            raise DataError(f"{path}: no sample is left; 'rollstream data check' says why")
    return {path: report.problems for path, report in reports.items() if report.problems}


def describe_untrainable(untrainable: Untrainable) -> list[str]:
    """Return a line for each data set of which samples are left out."""
    return [
        f"left out of {path}: {len(problems)} samples ({_reasons(problems)})"
        for path, problems in untrainable.items()
    ]


def write_untrainable(config: RunConfig, untrainable: Untrainable) -> None:
    """Write what is left out to the run folder, so that all roles leave out the same."""
    path = access.run_folder(config).untrainable
    if not config.data.skip_untrainable:
        path.unlink(missing_ok=True)
        return
    content = {
        jsonl: {
            problem.sample_id: {"reason": problem.reason, "detail": problem.detail} for problem in problems
        }
        for jsonl, problems in untrainable.items()
    }
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def untrainable_ids(config: RunConfig, jsonl: str) -> frozenset[str]:
    """Return the ids that the run leaves out of a data set: those written down, else found again here."""
    written = read_json_map(access.run_folder(config).untrainable)
    if written is not None:
        return frozenset(written.get(jsonl, {}))
    report = examine_dataset(config, jsonl, sample_ruler(config))
    return frozenset(problem.sample_id for problem in report.problems)


def read_samples(config: RunConfig, jsonl: str) -> list[Sample]:
    """Return a data set in the run's object order, without what the run leaves out; raises DataError."""
    if not config.data.skip_untrainable:
        return access.read_whole(config, jsonl)
    left_out = untrainable_ids(config, jsonl)
    kept = [
        sample
        for sample in access.read_whole(config, jsonl, passed_over={})
        if sample.sample_id not in left_out
    ]
    if not kept:
        raise DataError(f"{jsonl}: no sample is left; 'rollstream data check' says why")
    return kept


def _reasons(problems: tuple[SampleProblem, ...]) -> str:
    return ", ".join(f"{count} x {REASONS[reason]}" for reason, count in count_reasons(problems).items())


def _refusal(path: str, report: SampleReport) -> str:
    shown = [str(problem) for problem in report.problems[:MAX_SHOWN]]
    if len(report.problems) > len(shown):
        shown.append(f"and {len(report.problems) - len(shown)} more")
    head = (
        f"{Path(path)}: {len(report.problems)} of {report.num_samples} samples cannot be trained or shown "
        f"({_reasons(report.problems)}); correct them, or set data.skip_untrainable: true to leave them out"
    )
    return "\n  ".join([head, *shown])
