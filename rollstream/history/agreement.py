"""Does the log agree with all else that knows of it: counters, claims, training log, checkpoints [Q-20].

Pure: each function returns its disagreements as texts, none where all is well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker_schemas.records.ledger import Ledger, StepHistory


@dataclass(frozen=True, kw_only=True)
class BrokerSums:
    """What a broker says at one moment: its counters, its open claims, and the last event that they cover."""

    counters: Mapping[str, int]
    open_claims: frozenset[int]
    last_event_id: str


def counter_faults(ledger: Ledger, counters: Mapping[str, int]) -> list[str]:
    """Compare the running sums of the broker with those of the log."""
    rollouts = [item for item in ledger.rollouts.values() if item.purpose != "evaluation"]
    evaluating = [item for item in ledger.rollouts.values() if item.purpose == "evaluation"]
    stages = [item.stage for item in rollouts]
    kinds = [step.kind for step in ledger.steps.values()]
    of_log = {
        "pushed": sum(item.pushed_at_ms >= 0 for item in rollouts),
        "evaluation_pushed": sum(item.pushed_at_ms >= 0 for item in evaluating),
        "evaluated": sum(item.stage == "evaluated" for item in ledger.rollouts.values()),
        "evaluation_rejected": sum(item.stage == "rejected" for item in evaluating),
        "evaluation_dropped": sum(item.stage == "dropped" for item in evaluating),
        "trained_segments": stages.count("trained"),
        "dropped": stages.count("dropped"),
        "rejected": stages.count("rejected"),
        "steps:A": kinds.count("A"),
        "steps:B": kinds.count("B"),
        "committed_steps": len(ledger.committed),
        "policies_published": len(ledger.policies),
        "settled_steps": ledger.settled_steps,
        "reissued": ledger.reissued,
    }
    counted = {name: counters.get(name, 0) for name in of_log}
    for name in ("dropped", "rejected", "evaluation_rejected", "evaluation_dropped"):
        counted[name] = sum(value for key, value in counters.items() if key.startswith(f"{name}:"))
    return [
        f"{name}: the log gives {number}, the broker counted {counted[name]}"
        for name, number in of_log.items()
        if number != counted[name]
    ]


def claim_faults(ledger: Ledger, open_claims: Collection[int]) -> list[str]:
    """Compare the claims that the broker holds with those of the log that no checkpoint covers."""
    expected = {step for step in ledger.steps if step >= ledger.settled_steps}
    gone, unknown = sorted(expected - set(open_claims)), sorted(set(open_claims) - expected)
    faults = []
    if gone:
        faults.append(f"claims of optimizer steps {_some(gone)}: in the log, not in the broker")
    if unknown:
        faults.append(f"claims of optimizer steps {_some(unknown)}: in the broker, not in the log")
    return faults


def training_log_faults(ledger: Ledger, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare the training log, one row a step, with the committed
    steps; without a row there is nothing to compare.

    A step that a crashed broker lost is known by its row alone, and no fault.
    """
    by_step = {int(row["optimizer_step"]): row for row in rows}
    unknown, otherwise = [], []
    for optimizer_step, row in by_step.items():
        if optimizer_step in ledger.undone_steps:
            continue
        if optimizer_step not in ledger.committed:
            unknown.append(optimizer_step)
        elif not _is_as_logged(ledger, ledger.steps.get(optimizer_step), row):
            otherwise.append(optimizer_step)
    silent = [step for step in ledger.committed if step not in by_step and step < max(by_step, default=-1)]
    faults = []
    if unknown:
        faults.append(
            f"optimizer steps {_some(unknown)}: in the training log, not committed in the log of events; "
            "where the stack was killed, start it again: its broker may hold what the archive lacks"
        )
    if otherwise:
        faults.append(f"optimizer steps {_some(otherwise)}: the training log has another kind or number")
    if silent:
        faults.append(f"optimizer steps {_some(sorted(silent))}: committed, but not in the training log")
    return faults


def checkpoint_faults(ledger: Ledger, latest: int | None) -> list[str]:
    """Compare the steps that the latest checkpoint covers with the committed ones."""
    known = set(ledger.committed) | set(ledger.undone_steps)
    missing = [step for step in range(latest or 0) if step not in known]
    if not missing:
        return []
    return [f"checkpoint-{latest}: covers optimizer steps {_some(missing)}, which the log does not have"]


def payload_faults(ledger: Ledger, archived: Iterable[str] | Any) -> list[str]:
    """Say which trained rollouts the archive has no payload of; ``archived`` answers ``in``."""
    missing = [
        item.record_id
        for item in ledger.rollouts.values()
        if item.stage == "trained" and item.record_id not in archived
    ]
    if not missing:
        return []
    return [
        f"payloads of {len(missing)} trained rollouts are not in the archive, first {missing[0]}; "
        "their steps cannot be replayed"
    ]


def _is_as_logged(ledger: Ledger, step: StepHistory | None, row: Mapping[str, Any]) -> bool:
    if step is None or row.get("kind") != step.kind:
        return False
    if step.kind == "A":
        return True
    names = [name for *_, record_ids in step.packs for name in record_ids]
    trained = sum(ledger.rollouts[name].stage == "trained" for name in names)
    return bool(row.get("num_segments") == trained)


def _some(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    return shown if len(steps) <= 5 else f"{shown} and {len(steps) - 5} more"
