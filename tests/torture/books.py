"""The books at the end: what producers were told and ranks trained, against what the raw log says."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_schemas.broker.broker import Broker
from rollstream.history.archive_loss import read_losses
from rollstream.history.archive_reading import ArchivedEvents
from tests.torture.log_fold import ENDED, LIFE, LogTap, claims_of, lives_of, sums_of

ARCHIVE = "runs/torture/archive"


@dataclass(kw_only=True)
class Books:
    """What became of the rollouts; ``faults`` is empty where nothing was lost, stuck or trained twice.

    ``undone`` are events that a server forgot: what they alone say is lost by name, not by fault.
    """

    rows: dict[str, int]
    faults: list[str]
    accidents: Counter[str] = field(default_factory=Counter)
    leavings: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        rows = {**self.rows, **dict(sorted(self.accidents.items())), **dict(sorted(self.leavings.items()))}
        lines = [f"{name:<36}{number:>10}" for name, number in rows.items()]
        return "\n".join([*lines, *self.faults, "NOT balanced" if self.faults else "balanced"])


def read_books(folder: Path, broker: Broker, tap: LogTap, *, lossless: bool, is_over: bool = False) -> Books:
    """Fold the log and compare; ``is_over``: all roles have ended, so the archive is compared as well."""
    facts, undone = list(tap.facts), list(tap.undone)
    lives = lives_of(facts)
    lost_by_name = {name for fact in undone for name in fact.names}
    taken = {line for path in folder.glob("taken-*") for line in path.read_text().splitlines()}
    ready = ids_in_ready(broker)
    came = {name for name, life in lives.items() if "p" in life}
    twice = {name for name, life in lives.items() if not LIFE.fullmatch(life)}
    stuck = {name for name in came - twice - ready if not ENDED.fullmatch(lives[name])}
    open_ids = ids_of_open_requests(broker)
    unasked = {name for name, life in lives.items() if life == "a"} - open_ids
    lost = taken - came
    faults = [
        *shown("lost", lost if lossless else lost - lost_by_name),
        *shown("stuck", {f"{name} {lives[name]}" for name in stuck}),
        *shown("twice", {f"{name} {lives[name]}" for name in twice}),
        *shown("asked for and forgotten", unasked),
        *shown(
            "undone on a server that keeps everything", {fact.event_id for fact in undone} if lossless else ()
        ),
        *wrong_training(folder, claims_of(facts), {fact.step for fact in undone if fact.kind == "claimed"}),
    ]
    if not faults:
        faults += wrong_counters(broker, sums_of(facts, lives))
    if is_over:
        faults += wrong_archive(folder, {fact.event_id for fact in facts}, {fact.event_id for fact in undone})
    letters = Counter("".join(lives.values()))
    rows = {
        "events": len(facts),
        "asked for": letters["a"],
        "told taken": len(taken),
        "pushed": letters["p"],
        "trained": letters["c"],
        "dropped": letters["d"],
        "rejected": letters["r"],
        "requests' rollouts given up": letters["f"],
        "ready at the end": len(ready),
        "lost": len(lost - lost_by_name),
        "twice": len(twice),
        "events undone by a server": len(undone),
        "lost with them, by name": len(lost & lost_by_name),
        "trained again, by name": len(trained_again(undone, lives)),
    }
    return Books(rows=rows, faults=faults)


def shown(what: str, names: Collection[str]) -> list[str]:
    return [f"{what}: {len(names)}, such as {min(names)}"] if names else []


def trained_again(undone: Any, lives: dict[str, str]) -> set[str]:
    claimed = {name for fact in undone if fact.kind == "claimed" for name in fact.names}
    return {name for name in claimed if "c" in lives.get(name, "")}


def ids_in_ready(broker: Broker) -> set[str]:
    """Return the segments of packs that wait while another rank has none: nobody can claim them any more."""
    client, queues = broker.client, []
    for rank in range(2):
        entries: Any = client.xrange(broker.keys.ready(rank))
        queues.append([name for _, fields in entries for name in fields[b"ids"].decode().split()])
    if all(queues):
        return set()
    return {name for names in queues for name in names}


def ids_of_open_requests(broker: Broker) -> set[str]:
    requests: Any = broker.client.zrange(broker.keys.named("requests"), 0, -1)
    found = set()
    for request in requests:
        raw: Any = broker.client.hget(broker.keys.named(f"request:{request.decode()}"), "records")
        found |= set((raw or b"").decode().split())
    return found


def wrong_training(folder: Path, claims: dict[tuple[int, int], str], undone_steps: set[int]) -> list[str]:
    """Return where a rank trained other rollouts than its claim names, or other ones the second time."""
    notes: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    for path in folder.glob("trained-?"):
        for line in path.read_text().splitlines():
            step, tab, ids = line.partition("\t")
            if tab:
                notes[int(step), int(path.name[-1])].add(ids)
    wrong = {
        f"step {step} of rank {rank}"
        for (step, rank), trained in notes.items()
        if step not in undone_steps and trained != {claims.get((step, rank))}
    }
    return shown("trained otherwise than claimed", wrong)


def wrong_counters(broker: Broker, sums: Counter[str]) -> list[str]:
    """Return where the broker's running sums differ from the log, and bytes that nobody holds."""
    raw: Any = broker.client.hgetall(broker.keys.named("counters"))
    counters = {name.decode(): int(value) for name, value in raw.items()}
    counters["rejected"] = sum(number for name, number in counters.items() if name.startswith("rejected:"))
    faults = [
        f"counter {name}: got {counters.get(name, 0)}, the log says {number}"
        for name, number in sorted(sums.items())
        if counters.get(name, 0) != number
    ]
    held = held_bytes(broker)
    if counters.get("bytes", 0) != held:
        faults.append(f"counter bytes: got {counters.get('bytes', 0)}, the server holds {held}")
    return faults


def held_bytes(broker: Broker) -> int:
    client, prefix = broker.client, broker.keys.prefix
    patterns = [f"{prefix.replace('[', '').replace(']', '')}{kind}:*" for kind in ("body", "payload")]
    held = sum(int(client.strlen(key)) for pattern in patterns for key in client.scan_iter(pattern))  # type: ignore[arg-type]
    entries: Any = client.xrange(broker.keys.named("segments"))
    return held + sum(len(fields.get(b"line", b"")) for _, fields in entries)


def wrong_archive(folder: Path, events: set[str], undone: set[str]) -> list[str]:
    """Return what the archive lacks, has too much, or does not name as undone."""
    archived = ArchivedEvents(folder / ARCHIVE)
    kept = {event.event_id: event.kind for event in archived}
    losses = read_losses(folder / ARCHIVE)
    unnamed = {name for name in undone & set(kept) if not any(loss.covers(name) for loss in losses)}
    return [
        *archived.faults,
        *shown("events that are not archived", events - set(kept)),
        *shown("archived events that are in no log", set(kept) - events - undone),
        *shown("undone events that the archive does not name", unnamed),
        *shown(
            "events that the archive calls undone",
            {n for n in events if kept.get(n, "").startswith("undone")},
        ),
    ]
