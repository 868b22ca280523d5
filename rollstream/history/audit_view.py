"""The audit as text: the balance, one step, one sample. What names bring along is shown, never obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollstream.history.audit import Audit

SHOWN_FAULTS = 20


def plain(value: object) -> Text:
    """Return a value as text: no markup, no control characters, nothing that cannot be encoded."""
    return Text("".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value)))


def render_audit(audit: Audit) -> RenderableType:
    """Return the balance as a table."""
    table = Table(title="audit", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rollouts asked for", str(audit.asked))
    table.add_row("  trained", str(audit.trained))
    for reason, number in audit.dropped.items():
        table.add_row(plain(f"  dropped: {reason}"), str(number))
    for reason, number in audit.rejected.items():
        table.add_row(plain(f"  rejected: {reason}"), str(number))
    for stage, number in audit.in_flight.items():
        if number:
            table.add_row(f"  in flight: {stage}", str(number))
    table.add_row("  not accounted for", str(audit.difference))
    if audit.evaluation["asked"]:
        table.add_row("rollouts asked for to evaluate", str(audit.evaluation["asked"]))
        for stage in ("answered", "rejected", "in_flight"):
            table.add_row(f"  {stage.replace('_', ' ')}", str(audit.evaluation[stage]))
        table.add_row("  not accounted for", str(audit.evaluation_difference))
    table.add_row("steps A / B", f"{audit.steps['A']} / {audit.steps['B']}")
    table.add_row("B steps skipped due to the queue", str(audit.skipped))
    table.add_row("duplicates refused / requests run again", f"{audit.duplicates_refused} / {audit.reissued}")
    for name, buckets in audit.drops_by.items():
        if buckets:
            shown = ", ".join(f"{k}: {v}" for k, v in sorted(buckets.items()))
            table.add_row(f"drops by {name}", plain(shown))
    if audit.dropped:
        shares = audit.trained_share_by_length.items()
        shown = ", ".join(f"{bucket}: {share:.0%}" for bucket, share in sorted(shares))
        table.add_row("share trained by length_tokens", plain(shown))
    verdict = Text("balanced", "green") if audit.balanced else Text("NOT balanced", "red")
    lines = [*_log_lines(audit), *_undone_lines(audit.undone), *audit.faults[:SHOWN_FAULTS]]
    if len(audit.faults) > SHOWN_FAULTS:
        lines.append(f"and {len(audit.faults) - SHOWN_FAULTS} more faults; --json has them all")
    return Group(table, verdict, *map(plain, lines))


def _log_lines(audit: Audit) -> list[str]:
    if not audit.broker_not_asked:
        return []
    return [
        f"from the archive alone, the broker was not asked: {audit.broker_not_asked}. What it holds beyond "
        "the archive is not in the sums, and its counters and claims were not compared"
    ]


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
        return plain(f"optimizer step {optimizer_step} was never claimed; the last one is {last}")
    committed = "committed" if optimizer_step in audit.ledger.committed else "not committed"
    title = (
        f"optimizer step {optimizer_step}: {step.kind} ({step.reason}), "
        f"policy version {step.policy_version}, {committed}"
    )
    table = Table(title=plain(title), title_justify="left")
    for column in ("rank", "pack", "rollout", "version", "lag", "age s", "tokens", "sample"):
        table.add_column(column)
    for rank, pack_id, _, record_ids in step.packs:
        for name in record_ids:
            item = audit.ledger.rollouts[name]
            age_s = (step.claimed_at_ms - item.pushed_at_ms) / 1000
            lag = step.policy_version - item.policy_version
            row = (rank, pack_id, name, item.policy_version, lag, f"{age_s:.1f}", item.encoded_length)
            table.add_row(*map(plain, (*row, item.sample_id)))
    return table


def render_sample(audit: Audit, sample_id: str) -> RenderableType:
    """Return what became of every rollout of a sample."""
    table = Table(title=plain(f"rollouts of {sample_id}"), title_justify="left")
    for column in ("rollout", "version", "stage", "reason", "step", "pack"):
        table.add_column(column)
    for item in audit.ledger.rollouts.values():
        if item.sample_id == sample_id:
            step = str(item.optimizer_step) if item.optimizer_step >= 0 else ""
            cells = (item.record_id, item.policy_version, item.stage, item.reason, step, item.pack_id)
            table.add_row(*map(plain, cells))
    return table
