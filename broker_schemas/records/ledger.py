"""Folds the log into what became of every rollout. Pure: events in, a ledger out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from broker_schemas.records.events import ClaimedPack, LogEvent
from broker_schemas.records.packs import ClaimReason, without
from broker_schemas.records.records import Channel

Stage = Literal[
    "requested", "pushed", "matched", "packed", "claimed", "trained", "evaluated", "dropped", "rejected"
]
IN_FLIGHT: Final = ("requested", "pushed", "matched", "packed", "claimed")
UNDONE: Final = "undone:"
"""Before the kind of an archived event that a broker lost when it crashed."""
# from which stages a transition may be reached; anything else is a fault of ours, and the audit says so
ALLOWED: Final[dict[Stage, tuple[Stage | None, ...]]] = {
    "requested": (None,),
    "pushed": (None, "requested"),
    "matched": ("pushed",),
    "evaluated": ("pushed",),
    "packed": ("matched",),
    "claimed": ("packed",),
    "trained": ("claimed",),
    "dropped": ("pushed", "matched", "packed"),
    "rejected": ("requested", "pushed", "claimed", "trained"),
}


@dataclass(kw_only=True)
class RolloutHistory:
    """One rollout: where it is and what is known of it. Times are ms of the server's clock, -1 unknown.

    ``asked_for_step`` is the step that asked for it (on-policy
    variants), ``optimizer_step`` the one that claimed it.
    """

    record_id: str
    stage: Stage
    purpose: str = "train"
    request_id: str = ""
    reason: str = ""
    policy_version: int = -1
    num_tokens: int = -1
    encoded_length: int = -1
    task: str = ""
    sample_id: str = ""
    generated_at_ms: int = -1
    pushed_at_ms: int = -1
    ended_at_ms: int = -1
    asked_for_step: int = -1
    optimizer_step: int = -1
    pack_id: str = ""


@dataclass(frozen=True, kw_only=True)
class StepHistory:
    """One optimizer step as it was claimed. ``packs`` are (rank, pack id, policy version, segment ids)."""

    optimizer_step: int
    kind: Channel
    reason: ClaimReason
    policy_version: int
    claimed_at_ms: int
    packs: tuple[ClaimedPack, ...]
    short_ranks: tuple[int, ...]


@dataclass
class Ledger:
    """The state that the log gives. ``faults`` are transitions that must never happen.

    ``num_undone`` events were archived and then lost by a broker that crashed; they change nothing here.
    ``undone_steps`` are the claims among them: a learner may have trained them.
    """

    rollouts: dict[str, RolloutHistory] = field(default_factory=dict)
    steps: dict[int, StepHistory] = field(default_factory=dict)
    committed: dict[int, bytes] = field(default_factory=dict)
    policies: list[tuple[int, int]] = field(default_factory=list)
    settled_steps: int = 0
    reissued: int = 0
    last_event_id: str = "0-0"
    faults: list[str] = field(default_factory=list)
    num_undone: int = 0
    undone_steps: dict[int, StepHistory] = field(default_factory=dict)

    def apply(self, events: Iterable[LogEvent]) -> Ledger:
        """Fold ``events`` in and return self; events of unknown kind are faults, not errors."""
        for event in events:
            handler = HANDLERS.get(event.kind)
            if event.kind.startswith(UNDONE):
                _undone(self, event)
            elif handler is None:
                self.faults.append(f"event {event.event_id}: unknown kind {event.kind!r}")
            else:
                self._handle(handler, event)
            self.last_event_id = event.event_id
        return self

    def _handle(self, handler: Callable[[Ledger, LogEvent], None], event: LogEvent) -> None:
        try:
            handler(self, event)
        except (KeyError, ValueError, TypeError) as exc:
            self.faults.append(f"event {event.event_id}: {event.kind} cannot be read ({exc!r})")

    def move(self, record_id: str, stage: Stage, event: LogEvent) -> RolloutHistory:
        """Put a rollout into ``stage``; a transition that must not happen becomes a fault."""
        known = self.rollouts.get(record_id)
        if (known.stage if known else None) not in ALLOWED[stage]:
            self.faults.append(
                f"event {event.event_id}: {record_id}: {known.stage if known else 'nothing'} -> {stage}"
            )
        if known is None:
            known = self.rollouts[record_id] = RolloutHistory(record_id=record_id, stage=stage)
        known.stage = stage
        if stage not in IN_FLIGHT:
            known.ended_at_ms = event.at_ms
        return known


def _requested(ledger: Ledger, event: LogEvent) -> None:
    for record_id in event.ids():
        item = ledger.move(record_id, "requested", event)
        item.request_id, item.purpose = event.text("request_id"), event.text("purpose")


def _pushed(ledger: Ledger, event: LogEvent) -> None:
    for row in event.pushed_rows():
        item = ledger.move(row.record_id, "pushed", event)
        item.asked_for_step = row.optimizer_step
        item.policy_version, item.num_tokens = row.policy_version, row.num_tokens
        item.request_id, item.task = row.request_id, row.task
        item.sample_id, item.purpose = row.sample_id, row.purpose
        item.generated_at_ms, item.pushed_at_ms = row.generated_at_ms, event.at_ms


def _matched(ledger: Ledger, event: LogEvent) -> None:
    for record_id, encoded_length in event.matched_rows():
        ledger.move(record_id, "matched", event).encoded_length = encoded_length


def _evaluated(ledger: Ledger, event: LogEvent) -> None:
    for record_id in event.ids():
        ledger.move(record_id, "evaluated", event)


def _rejected(ledger: Ledger, event: LogEvent) -> None:
    for record_id, reason in event.rejected_rows():
        if record_id not in ledger.rollouts:  # bytes that no push of ours brought: accounted for on their own
            ledger.rollouts[record_id] = RolloutHistory(
                record_id=record_id, stage="pushed", purpose="foreign"
            )
        ledger.move(record_id, "rejected", event).reason = reason


def _request_failed(ledger: Ledger, event: LogEvent) -> None:
    for record_id in event.ids():
        known = ledger.rollouts.get(record_id)
        if known is None or known.stage == "requested":
            ledger.move(record_id, "rejected", event).reason = event.text("reason")


def _dropped(ledger: Ledger, event: LogEvent) -> None:
    for record_id in event.ids():
        ledger.move(record_id, "dropped", event).reason = event.text("reason")


def _packed(ledger: Ledger, event: LogEvent) -> None:
    for record_id in event.ids():
        ledger.move(record_id, "packed", event).pack_id = event.text("pack_id")


def _claimed(ledger: Ledger, event: LogEvent) -> None:
    step = _step_of(event)
    for pack in step.packs:
        for record_id in pack.record_ids:
            ledger.move(record_id, "claimed", event).optimizer_step = step.optimizer_step
    if step.optimizer_step in ledger.steps:
        ledger.faults.append(
            f"event {event.event_id}: optimizer step {step.optimizer_step} was claimed twice"
        )
    ledger.steps[step.optimizer_step] = step


def _quarantined(ledger: Ledger, event: LogEvent) -> None:
    """What left its claim is rejected, although it may have been trained: a resume trains the step again."""
    optimizer_step, rows = event.number("optimizer_step"), event.rejected_rows()
    for record_id, reason in rows:
        ledger.move(record_id, "rejected", event).reason = reason
    gone = {record_id for record_id, _ in rows}
    step = ledger.steps.get(optimizer_step)
    if step is None or not gone <= {name for pack in step.packs for name in pack.record_ids}:
        ledger.faults.append(
            f"event {event.event_id}: optimizer step {optimizer_step} never claimed what was quarantined"
        )
        return
    packs = tuple(pack._replace(record_ids=without(pack.record_ids, gone)) for pack in step.packs)
    ledger.steps[optimizer_step] = replace(step, packs=packs)


def _undone(ledger: Ledger, event: LogEvent) -> None:
    ledger.num_undone += 1
    if event.kind == UNDONE + "claimed":
        step = _step_of(event)
        ledger.undone_steps[step.optimizer_step] = step


def _step_of(event: LogEvent) -> StepHistory:
    return StepHistory(
        optimizer_step=event.number("optimizer_step"),
        kind="B" if event.text("kind") == "B" else "A",
        reason=event.text("reason"),  # type: ignore[arg-type]
        policy_version=event.number("policy_version"),
        claimed_at_ms=event.at_ms,
        packs=tuple(event.claimed_packs()),
        short_ranks=tuple(int(rank) for rank in event.ids("short")),
    )


def _committed(ledger: Ledger, event: LogEvent) -> None:
    optimizer_step = event.number("optimizer_step")
    ledger.committed[optimizer_step] = event.fields["summary"]
    step = ledger.steps.get(optimizer_step)
    if step is None:
        ledger.faults.append(
            f"event {event.event_id}: optimizer step {optimizer_step} was committed and never claimed"
        )
        return
    for pack in step.packs:
        for record_id in pack.record_ids:
            ledger.move(record_id, "trained", event)


def _settled(ledger: Ledger, event: LogEvent) -> None:
    ledger.settled_steps = event.number("optimizer_steps")


def _policy_published(ledger: Ledger, event: LogEvent) -> None:
    ledger.policies.append((event.number("policy_version"), event.number("optimizer_step")))


def _reissued(ledger: Ledger, event: LogEvent) -> None:
    ledger.reissued += 1


def _noted(ledger: Ledger, event: LogEvent) -> None:
    """Steps opened and sealed, settings and leases change nothing of a rollout."""


HANDLERS: Final[dict[str, Callable[[Ledger, LogEvent], None]]] = {
    "requested": _requested,
    "reissued": _reissued,
    "request_failed": _request_failed,
    "pushed": _pushed,
    "matched": _matched,
    "evaluated": _evaluated,
    "rejected": _rejected,
    "dropped": _dropped,
    "quarantined": _quarantined,
    "packed": _packed,
    "sealed": _noted,
    "run_adopted": _noted,
    "settings_changed": _noted,
    "lease_taken": _noted,
    "step_opened": _noted,
    "evaluation_settled": _noted,
    "claimed": _claimed,
    "committed": _committed,
    "settled": _settled,
    "policy_published": _policy_published,
}
