"""`rollstream data check`: every sample of a run that could not be trained or shown, and all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from broker_schemas.errors import DataError
from broker_schemas.method.trainability import REASONS, SampleReport, count_reasons
from configs import RunConfig
from rollstream.datasets.measuring import rounded_up
from rollstream.wiring.trainable import examine_dataset, sample_ruler


def check_data(config: RunConfig, *, is_thorough: bool = True) -> dict[str, SampleReport]:
    """Return what was found in the training and the validation set, by ``train`` and ``val``.

    Without a model (one described inline, not made yet) nothing is measured in tokens. Raises DataError for
    lines that break the format.
    """
    ruler = None
    if config.model.name_or_path is not None:
        ruler = sample_ruler(config)
    found = {"train": config.data.train_jsonl, "val": config.data.val_jsonl}
    return {
        split: examine_dataset(config, path, ruler, is_thorough=is_thorough)
        for split, path in found.items()
        if path is not None
    }


def describe_check(config: RunConfig, reports: dict[str, SampleReport]) -> Iterator[str]:
    """Yield the lines for a terminal: problems, the longest lengths, the settings that suit them."""
    for split, report in reports.items():
        num_bad = len(report.problems)
        yield f"{split}: {report.num_samples} samples, {num_bad} that cannot be trained or shown"
        for reason, count in count_reasons(report.problems).items():
            yield f"  {count} x {REASONS[reason]}"
        yield from (f"  {problem}" for problem in report.problems)
        longest = report.longest
        if longest is not None:
            yield (
                f"  longest: {longest.total} tokens ({longest.sample_id}); prompt with image up to "
                f"{report.longest_prompt}, list of objects up to {report.longest_payload}"
            )
    yield from _suggestions(config, reports)


def _suggestions(config: RunConfig, reports: dict[str, SampleReport]) -> Iterator[str]:
    longest = reports["train"].longest
    if longest is None:
        return
    payload = max(report.longest_payload for report in reports.values())
    limits = (
        ("training.global_max_length", config.training.global_max_length, longest.total),
        ("custom.extra.rollout_matching.max_new_tokens", config.rollout_matching.max_new_tokens, payload),
    )
    for key, value, needed in limits:
        verdict = "holds all" if value >= needed else f"too small; {rounded_up(needed)} holds all"
        yield f"{key}: {value}, needed {needed}: {verdict}"
    if any(report.problems for report in reports.values()):
        yield "next: correct those samples, or set data.skip_untrainable: true to leave them out"
    else:
        yield "next: rollstream doctor, then rollstream learn or up"


def check_to_json(reports: dict[str, SampleReport]) -> dict[str, Any]:
    """Return the reports as plain values."""
    return {
        split: {
            "num_samples": report.num_samples,
            "problems": [vars(problem) for problem in report.problems],
            "reasons": dict(count_reasons(report.problems)),
            "longest_total": report.longest.total if report.longest else None,
            "longest_sample": report.longest.sample_id if report.longest else None,
            "longest_prompt": report.longest_prompt,
            "longest_payload": report.longest_payload,
        }
        for split, report in reports.items()
    }


def refuse_problems(reports: dict[str, SampleReport]) -> None:
    """Raise DataError where a sample cannot be used, so that a script sees it."""
    num_bad = sum(len(report.problems) for report in reports.values())
    if num_bad:
        raise DataError(f"data check: {num_bad} samples cannot be trained or shown")
