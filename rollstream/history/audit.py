"""The balance of a run: every rollout that was asked for, and what became of it [Q-14, Q-17]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.records.events import LogEvent
from broker_schemas.records.ledger import IN_FLIGHT, Ledger, RolloutHistory
from rollstream.history.archive import last_archived, read_archived_events
from rollstream.history.archive_loss import BrokerLoss, as_it_stands, find_loss, noted_cursor

LENGTH_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The sums. ``balanced``: asked = trained + dropped + rejected + in flight, and no fault in the log.

    ``undone`` is empty unless a broker crashed and lost what it had acknowledged: then the sums are those of
    the log as it went on, and it says what that log no longer knows.
    """

    asked: int
    trained: int
    dropped: dict[str, int]
    rejected: dict[str, int]
    in_flight: dict[str, int]
    evaluated: int
    duplicates_refused: int
    reissued: int
    steps: dict[str, int]
    skipped: int
    drops_by: dict[str, dict[str, int]]
    faults: list[str]
    undone: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(repr=False)

    @property
    def difference(self) -> int:
        """Rollouts that no sum accounts for."""
        ended = self.trained + sum(self.dropped.values()) + sum(self.rejected.values())
        return self.asked - ended - sum(self.in_flight.values())

    @property
    def balanced(self) -> bool:
        return self.difference == 0 and not self.faults

    def to_json(self) -> dict[str, Any]:
        return {
            "balanced": self.balanced,
            "difference": self.difference,
            "asked": self.asked,
            "trained": self.trained,
            "dropped": self.dropped,
            "rejected": self.rejected,
            "in_flight": self.in_flight,
            "evaluated": self.evaluated,
            "duplicates_refused": self.duplicates_refused,
            "reissued": self.reissued,
            "steps": self.steps,
            "b_steps_skipped_due_to_queue": self.skipped,
            "drops_by": self.drops_by,
            "faults": self.faults,
            "undone": self.undone,
        }


def all_events(archive: Path, broker: Broker | None) -> Iterator[LogEvent]:
    """Yield the whole log: the archive, then what the broker has beyond it."""
    last = "-"
    losses = [] if broker is None else _unnoted_losses(archive, broker)
    for event in read_archived_events(archive):
        last = event.event_id
        yield as_it_stands(event, losses)
    if broker is not None:
        yield from read_events(broker, after=last)


def _unnoted_losses(archive: Path, broker: Broker) -> list[BrokerLoss]:
    """Return what the broker lost since the archive last spoke to it."""
    noted = noted_cursor(broker)  # before the archive is read: it may go on meanwhile
    loss = find_loss(broker, last_archived(archive), noted)
    return [] if loss is None else [loss]


def take_audit(events: Iterator[LogEvent], *, counters: dict[str, int] | None = None) -> Audit:
    """Fold the log and sum it up; ``counters`` of the broker, where given, must agree with the log."""
    ledger = Ledger().apply(events)
    rollouts = [item for item in ledger.rollouts.values() if item.purpose != "evaluation"]
    stages = Counter(item.stage for item in rollouts)
    faults = list(ledger.faults)
    if counters is not None:
        faults += _disagreements(ledger, counters)
    steps = Counter(step.kind for step in ledger.steps.values())
    return Audit(
        asked=len(rollouts),
        trained=stages["trained"],
        dropped=_by_reason(rollouts, "dropped"),
        rejected=_by_reason(rollouts, "rejected"),
        in_flight={stage: stages[stage] for stage in IN_FLIGHT},
        evaluated=sum(item.stage == "evaluated" for item in ledger.rollouts.values()),
        duplicates_refused=(counters or {}).get("duplicates", 0),
        reissued=ledger.reissued,
        steps={"A": steps["A"], "B": steps["B"]},
        skipped=sum(step.reason == "queue_short" for step in ledger.steps.values()),
        drops_by=_drops_by(rollouts),
        faults=faults,
        undone=_undone(ledger),
        ledger=ledger,
    )


def _undone(ledger: Ledger) -> dict[str, Any]:
    """Return what a crashed broker lost: events, the optimizer steps among them, rollouts that it gave again.

    ``trained_again``: rollouts of a lost claim that stand in another claim; at most as many were trained
    twice, where a checkpoint already covered the lost one.
    """
    if not ledger.num_undone:
        return {}
    lost = {name for step in ledger.undone_steps.values() for *_, names in step.packs for name in names}
    again = [
        name
        for step in ledger.steps.values()
        for *_, names in step.packs
        for name in names
        if name in lost and not _is_same_claim(ledger, step.optimizer_step)
    ]
    return {
        "events": ledger.num_undone,
        "optimizer_steps": sorted(ledger.undone_steps),
        "trained_again": len(again),
    }


def _is_same_claim(ledger: Ledger, optimizer_step: int) -> bool:
    lost = ledger.undone_steps.get(optimizer_step)
    return lost is not None and lost.packs == ledger.steps[optimizer_step].packs


def _by_reason(rollouts: list[RolloutHistory], stage: str) -> dict[str, int]:
    return dict(sorted(Counter(item.reason for item in rollouts if item.stage == stage).items()))


def _drops_by(rollouts: list[RolloutHistory]) -> dict[str, dict[str, int]]:
    dropped = [item for item in rollouts if item.stage == "dropped"]
    return {
        "length_tokens": dict(Counter(length_bucket(item.num_tokens) for item in dropped)),
        "task": dict(Counter(item.task for item in dropped)),
        "age_s": dict(Counter(age_bucket(item) for item in dropped)),
    }


def length_bucket(num_tokens: int) -> str:
    """Return the bucket of a length: the smallest power of two that holds it, or more."""
    for limit in LENGTH_BUCKETS:
        if num_tokens <= limit:
            return f"<={limit}"
    return f">{LENGTH_BUCKETS[-1]}"


def age_bucket(item: RolloutHistory) -> str:
    """Return the bucket of a rollout's age when it ended, in seconds since it was pushed."""
    age_s = (item.ended_at_ms - item.pushed_at_ms) / 1000
    for limit in (1, 3, 10, 30, 100, 300):
        if age_s <= limit:
            return f"<={limit}"
    return ">300"


def _disagreements(ledger: Ledger, counters: dict[str, int]) -> list[str]:
    trained = sum(item.stage == "trained" for item in ledger.rollouts.values())
    dropped = sum(item.stage == "dropped" for item in ledger.rollouts.values())
    rejected = sum(item.stage == "rejected" for item in ledger.rollouts.values())
    expected = {
        "trained_segments": (trained, counters.get("trained_segments", 0)),
        "dropped": (dropped, sum(v for k, v in counters.items() if k.startswith("dropped:"))),
        "rejected": (rejected, sum(v for k, v in counters.items() if k.startswith("rejected:"))),
    }
    return [
        f"{name}: the log gives {from_log}, the broker counted {counted}"
        for name, (from_log, counted) in expected.items()
        if from_log != counted
    ]


def render_audit(audit: Audit) -> RenderableType:
    """Return the balance as a table."""
    table = Table(title="audit", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rollouts asked for", str(audit.asked))
    table.add_row("  trained", str(audit.trained))
    for reason, number in audit.dropped.items():
        table.add_row(f"  dropped: {reason}", str(number))
    for reason, number in audit.rejected.items():
        table.add_row(f"  rejected: {reason}", str(number))
    for stage, number in audit.in_flight.items():
        if number:
            table.add_row(f"  in flight: {stage}", str(number))
    table.add_row("  not accounted for", str(audit.difference))
    table.add_row("steps A / B", f"{audit.steps['A']} / {audit.steps['B']}")
    table.add_row("B steps skipped due to the queue", str(audit.skipped))
    table.add_row("duplicates refused / requests run again", f"{audit.duplicates_refused} / {audit.reissued}")
    for name, buckets in audit.drops_by.items():
        if buckets:
            table.add_row(f"drops by {name}", ", ".join(f"{k}: {v}" for k, v in sorted(buckets.items())))
    verdict = "[green]balanced[/green]" if audit.balanced else "[red]NOT balanced[/red]"
    return Group(table, verdict, *_undone_lines(audit.undone), *audit.faults[:20])


def _undone_lines(undone: Mapping[str, Any]) -> list[str]:
    if not undone:
        return []
    steps = ", ".join(str(step) for step in undone["optimizer_steps"]) or "none"
    return [
        f"the broker crashed and lost {undone['events']} acknowledged events; optimizer steps among them: "
        f"{steps}; rollouts claimed again by another step: {undone['trained_again']}. The sums are those of "
        "the log as it went on; broker.durability 'always' loses nothing"
    ]


def render_step(audit: Audit, optimizer_step: int) -> RenderableType:
    """Return which rollouts trained a step: rank, pack, id, version, age when claimed, sample."""
    step = audit.ledger.steps.get(optimizer_step)
    if step is None:
        last = max(audit.ledger.steps, default=-1)
        return f"optimizer step {optimizer_step} was never claimed; the last one is {last}"
    committed = "committed" if optimizer_step in audit.ledger.committed else "not committed"
    title = (
        f"optimizer step {optimizer_step}: {step.kind} ({step.reason}), "
        f"policy version {step.policy_version}, {committed}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("rank", "pack", "rollout", "version", "lag", "age s", "tokens", "sample"):
        table.add_column(column)
    for rank, pack_id, _, record_ids in step.packs:
        for name in record_ids:
            item = audit.ledger.rollouts[name]
            age_s = (step.claimed_at_ms - item.pushed_at_ms) / 1000
            lag = step.policy_version - item.policy_version
            row = (rank, pack_id, name, item.policy_version, lag, f"{age_s:.1f}", item.encoded_length)
            table.add_row(*(str(cell) for cell in row), item.sample_id)
    return table


def render_sample(audit: Audit, sample_id: str) -> RenderableType:
    """Return what became of every rollout of a sample."""
    table = Table(title=f"rollouts of {sample_id}", title_justify="left")
    for column in ("rollout", "version", "stage", "reason", "step", "pack"):
        table.add_column(column)
    for item in audit.ledger.rollouts.values():
        if item.sample_id == sample_id:
            step = str(item.optimizer_step) if item.optimizer_step >= 0 else ""
            table.add_row(
                item.record_id, str(item.policy_version), item.stage, item.reason, step, item.pack_id
            )
    return table
