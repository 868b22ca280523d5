"""The balance of a run: every rollout that was asked for, and what became of it [Q-14, Q-17]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.records.events import LogEvent
from broker_schemas.records.ledger import IN_FLIGHT, Ledger, RolloutHistory
from rollstream.history.agreement import counter_faults
from rollstream.history.archive_loss import BrokerLoss, as_it_stands, event_order, find_loss, noted_cursor
from rollstream.history.archive_reading import ArchivedEvents, last_archived

LENGTH_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The sums. ``balanced``: asked = trained + dropped + rejected + in flight, and no fault in the log.

    ``undone`` is empty unless a broker crashed and lost what it had acknowledged: then the sums are those of
    the log as it went on, and it says what that log no longer knows.
    ``broker_not_asked`` says why the sums are those of the archive alone; empty where the broker was asked.
    """

    asked: int
    trained: int
    dropped: dict[str, int]
    rejected: dict[str, int]
    in_flight: dict[str, int]
    evaluated: int
    evaluation: dict[str, int]
    duplicates_refused: int
    reissued: int
    steps: dict[str, int]
    skipped: int
    drops_by: dict[str, dict[str, int]]
    trained_share_by_length: dict[str, float]
    faults: list[str]
    undone: dict[str, Any] = field(default_factory=dict)
    broker_not_asked: str = ""
    ledger: Ledger = field(repr=False)

    @property
    def difference(self) -> int:
        """Rollouts that no sum accounts for."""
        ended = self.trained + sum(self.dropped.values()) + sum(self.rejected.values())
        return self.asked - ended - sum(self.in_flight.values())

    @property
    def balanced(self) -> bool:
        return self.difference == 0 and self.evaluation_difference == 0 and not self.faults

    @property
    def evaluation_difference(self) -> int:
        """Rollouts asked for to evaluate that no sum accounts for."""
        sums = dict(self.evaluation)
        return sums.pop("asked", 0) - sum(sums.values())

    @property
    def quarantined(self) -> int:
        """Rollouts taken out of a claim, as far as they stand among the rejected."""
        return sum(n for reason, n in self.rejected.items() if reason.startswith("quarantined"))

    def to_json(self) -> dict[str, Any]:
        return {
            "balanced": self.balanced,
            "difference": self.difference,
            "asked": self.asked,
            "trained": self.trained,
            "dropped": self.dropped,
            "rejected": self.rejected,
            "quarantined": self.quarantined,
            "in_flight": self.in_flight,
            "evaluated": self.evaluated,
            "evaluation": self.evaluation,
            "duplicates_refused": self.duplicates_refused,
            "reissued": self.reissued,
            "steps": self.steps,
            "b_steps_skipped_due_to_queue": self.skipped,
            "drops_by": self.drops_by,
            "trained_share_by_length_tokens": self.trained_share_by_length,
            "faults": self.faults,
            "undone": self.undone,
            "log": "archive" if self.broker_not_asked else "archive and broker",
            "broker_not_asked": self.broker_not_asked,
        }


@dataclass
class WholeLog:
    """The whole log of a run: the archive, then what the broker has beyond it, up to ``upto`` if given.

    ``faults`` of the archive fill while it is iterated.
    """

    archive: Path
    broker: Broker | None
    upto: str | None = None
    faults: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[LogEvent]:
        losses = [] if self.broker is None else _unnoted_losses(self.archive, self.broker)
        archived = ArchivedEvents(self.archive)
        for event in archived:
            if self._is_beyond(event):
                break
            yield as_it_stands(event, losses)
        self.faults += archived.faults
        if self.broker is None:
            return
        for event in read_events(self.broker, after=archived.last_id):
            if self._is_beyond(event):
                return
            yield event

    def _is_beyond(self, event: LogEvent) -> bool:
        return self.upto is not None and event_order(event.event_id) > event_order(self.upto)


def _unnoted_losses(archive: Path, broker: Broker) -> list[BrokerLoss]:
    """Return what the broker lost since the archive last spoke to it."""
    noted = noted_cursor(broker)  # before the archive is read: it may go on meanwhile
    loss = find_loss(broker, last_archived(archive), noted)
    return [] if loss is None else [loss]


def take_audit(events: Iterable[LogEvent], *, counters: dict[str, int] | None = None) -> Audit:
    """Fold the log and sum it up; ``counters`` of the broker, where given, must agree with the log."""
    ledger = Ledger().apply(events)
    rollouts = [item for item in ledger.rollouts.values() if item.purpose != "evaluation"]
    stages = Counter(item.stage for item in rollouts)
    faults = list(ledger.faults)
    if counters is not None:
        faults += counter_faults(ledger, counters)
    steps = Counter(step.kind for step in ledger.steps.values())
    return Audit(
        asked=len(rollouts),
        trained=stages["trained"],
        dropped=_by_reason(rollouts, "dropped"),
        rejected=_by_reason(rollouts, "rejected"),
        in_flight={stage: stages[stage] for stage in IN_FLIGHT},
        evaluated=sum(item.stage == "evaluated" for item in ledger.rollouts.values()),
        evaluation=_evaluation(ledger),
        duplicates_refused=(counters or {}).get("duplicates", 0),
        reissued=ledger.reissued,
        steps={"A": steps["A"], "B": steps["B"]},
        skipped=sum(step.reason == "queue_short" for step in ledger.steps.values()),
        drops_by=_drops_by(rollouts),
        trained_share_by_length=trained_share_by_length(rollouts),
        faults=faults,
        undone=_undone(ledger),
        ledger=ledger,
    )


def _evaluation(ledger: Ledger) -> dict[str, int]:
    """Return the sums of the rollouts that were asked for to evaluate, apart from those of training."""
    stages = Counter(item.stage for item in ledger.rollouts.values() if item.purpose == "evaluation")
    return {
        "asked": sum(stages.values()),
        "answered": stages["evaluated"],
        "rejected": stages["rejected"] + stages["dropped"],
        "in_flight": sum(stages[stage] for stage in IN_FLIGHT),
    }


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


def trained_share_by_length(rollouts: Sequence[RolloutHistory]) -> dict[str, float]:
    """Return the share trained among those trained or dropped, by length; falling shares show a bias."""
    ended = [item for item in rollouts if item.stage in ("trained", "dropped")]
    numbers = Counter(length_bucket(item.num_tokens) for item in ended)
    trained = Counter(length_bucket(item.num_tokens) for item in ended if item.stage == "trained")
    return {bucket: trained[bucket] / number for bucket, number in numbers.items()}


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
