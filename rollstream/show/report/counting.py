"""Folds the training log and the stack's samples into the key numbers of a report. Pure.

Fields may be missing or of the wrong type: what a run did not write is None here, not zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from broker_schemas.records.schedule import is_rollout_step
from rollstream.show.report.data import KeyNumbers

Rows = Sequence[Mapping[str, Any]]
LONGEST_PAUSE_MS: Final = 15_000
LARGEST_NUMBER: Final = 1e15
_OBJECT_DROP_PREFIX: Final = "rollout/dropped_"


def key_numbers(steps: Rows, samples: Rows, *, b_ratio: str | None) -> KeyNumbers:
    """Return the numbers of a run; ``steps`` one row for each optimizer step, ``samples`` in time order."""
    last = samples[-1] if samples else {}
    b_steps = [row for row in steps if row.get("kind") == "B"]
    wait_s, busy_s = total(steps, "wait_s"), total(steps, "busy_s")
    return KeyNumbers(
        num_steps=len(steps),
        num_b_steps=len(b_steps),
        num_scheduled_b_steps=_scheduled_b_steps(steps, b_ratio),
        scheduled_b_ratio=b_ratio,
        skips=Counter(str(row.get("reason")) for row in steps if is_skip(row)),
        rollouts_requested=count(last, "requested"),
        rollouts_pushed=count(last, "pushed"),
        rollouts_trained=count(last, "trained_segments"),
        rollouts_in_flight=count(last, "in_flight"),
        duplicates=count(last, "duplicates"),
        drops=counts(last, "dropped"),
        rejects=counts(last, "rejected"),
        object_drops=_object_drops(steps),
        idle_share=wait_s / (wait_s + busy_s) if wait_s + busy_s > 0 else None,
        rollouts_per_s=rate_per_s(samples, "pushed"),
        tokens_per_s=_tokens_per_s(steps),
        steps_per_s=_ratio(len(steps), total(steps, "step_s")),
        mean_fill=_mean(number(row, "fill") for row in b_steps),
        last_policy_version=count(last, "policy_version"),
        peak_broker_bytes=max(
            (found for row in samples if (found := count(row, "broker_bytes"))), default=None
        ),
        restarts=_restarts(last),
        demand_advice=str(last.get("demand_advice") or ""),
        duration_s=_duration_s([*samples, *steps]),
    )


def is_skip(row: Mapping[str, Any]) -> bool:
    """Return whether a step ran A although the schedule said B."""
    return row.get("kind") == "A" and row.get("reason") not in ("schedule", None)


def number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a row, None for anything else and for what is infinite or absurdly large."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST_NUMBER else None


def count(row: Mapping[str, Any], name: str) -> int | None:
    """Return a whole number of a row, None for anything else."""
    value = number(row, name)
    return None if value is None else int(value)


def counts(row: Mapping[str, Any], name: str) -> dict[str, int]:
    """Return a map of reason to count, largest first; empty for anything else."""
    found = row.get(name)
    if not isinstance(found, Mapping):
        return {}
    known = {str(reason): value for reason in found if (value := count(found, reason))}
    return dict(sorted(known.items(), key=lambda item: (-item[1], item[0])))


def total(rows: Rows, name: str) -> float:
    """Return the sum of a field over the rows that have it."""
    return sum(value for row in rows if (value := number(row, name)) is not None)


def rate_per_s(samples: Rows, name: str) -> float | None:
    """Return how fast a running count rose, per second of sampled time.

    Pauses above LONGEST_PAUSE_MS (the stack was down) and falls of the count (it was started anew) are
    left out. None for fewer than two samples.
    """
    risen, elapsed_ms = 0.0, 0.0
    for earlier, later in zip(samples, samples[1:], strict=False):
        values = [number(row, key) for row in (earlier, later) for key in ("time_ms", name)]
        if None in values:
            continue
        start_ms, start, end_ms, end = (float(value) for value in values if value is not None)
        if 0 < end_ms - start_ms <= LONGEST_PAUSE_MS and end >= start:
            risen += end - start
            elapsed_ms += end_ms - start_ms
    return _ratio(risen, elapsed_ms / 1000)


def _scheduled_b_steps(steps: Rows, b_ratio: str | None) -> int | None:
    if b_ratio is None:
        return None
    known = (s for row in steps if (s := count(row, "optimizer_step")) is not None and s >= 0)
    return sum(is_rollout_step(optimizer_step, b_ratio) for optimizer_step in known)


def _object_drops(steps: Rows) -> dict[str, int]:
    found: Counter[str] = Counter()
    for row in steps:
        for name in row:
            if name.startswith(_OBJECT_DROP_PREFIX) and (value := count(row, name)):
                found[name.removeprefix(_OBJECT_DROP_PREFIX)] += value
    return dict(found.most_common())


def _restarts(sample: Mapping[str, Any]) -> dict[str, int]:
    found: Counter[str] = Counter()
    roles = sample.get("roles")
    for role in roles if isinstance(roles, list) else []:
        if isinstance(role, Mapping) and (value := count(role, "restarts")):
            found[str(role.get("role", "?"))] += value
    return dict(found)


def _tokens_per_s(steps: Rows) -> float | None:
    timed = [row for row in steps if number(row, "step_s") and number(row, "num_tokens") is not None]
    return _ratio(total(timed, "num_tokens"), total(timed, "step_s"))


def _duration_s(rows: Rows) -> float | None:
    times = sorted(value for row in rows if (value := number(row, "time_ms")) is not None)
    if len(times) < 2:
        return None
    return sum(b - a for a, b in zip(times, times[1:], strict=False) if b - a <= 20 * LONGEST_PAUSE_MS) / 1000


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
