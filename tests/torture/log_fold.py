"""What became of each rollout by the raw log: read from the server past the proxy, folded here from nothing.

Nothing of the project's own ledger, audit or archive is used; only the layout of the log's fields is known.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis

# asked for, then failed, or pushed, rejected, dropped, matched, packed, claimed, taken out of its claim again
LIFE: Final = re.compile(r"a?(?:f|p(?:r|d|m(?:d|k(?:d|cq?)?)?)?)?")
ENDED: Final = re.compile(r"a?p(?:r|d|m(?:d|k(?:d|cq?)))")
LETTERS: Final = {
    "requested": "a",
    "request_failed": "f",
    "pushed": "p",
    "matched": "m",
    "rejected": "r",
    "dropped": "d",
    "packed": "k",
    "claimed": "c",
    "quarantined": "q",
}


@dataclass(frozen=True)
class Fact:
    """One event: its id, its kind, the ids that it names, and for a claim the step and the ids by rank."""

    event_id: str
    kind: str
    names: tuple[str, ...]
    reason: str = ""
    step: int = -1
    by_rank: tuple[tuple[int, str], ...] = ()


def fact_of(event_id: bytes, fields: Mapping[bytes, bytes]) -> Fact:
    kind = fields[b"type"].decode()
    lines = fields.get(b"records", b"").decode().split("\n")
    heads = tuple(line.partition("\t")[0] for line in lines if line)
    names = heads or tuple(fields.get(b"ids", b"").decode().split())
    by_rank: tuple[tuple[int, str], ...] = ()
    if kind == "claimed":
        rows = [line.split("\t") for line in fields[b"packs"].decode().split("\n") if line]
        by_rank = tuple((int(rank), ids) for rank, _, _, ids in rows)
        names = tuple(name for _, ids in by_rank for name in ids.split())
    step = int(fields.get(b"optimizer_step", b"-1"))
    return Fact(event_id.decode(), kind, names, fields.get(b"reason", b"").decode(), step, by_rank)


def place_of(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number)


class LogTap:
    """Follows a log in a thread; events that a restarted server no longer has go to ``undone``."""

    def __init__(self, url: str, stream: str) -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=5.0)
        self._stream = stream
        self._ends = threading.Event()
        self._must_look = False
        self.facts: list[Fact] = []
        self.undone: list[Fact] = []
        self.num_trained = 0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def catch_up(self) -> None:
        """End the thread and read on to the end of the log."""
        self.close()
        while self._read(block_ms=None):
            pass

    def close(self) -> None:
        self._ends.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ends.is_set():
            try:
                self._read(block_ms=200)
            except (redis.RedisError, OSError):
                self._must_look = True
                self._ends.wait(0.1)

    def _read(self, *, block_ms: int | None) -> int:
        if self._must_look:
            self._find_undone()
            self._must_look = False
        after = self.facts[-1].event_id if self.facts else "0-0"
        reply: Any = self._client.xread({self._stream: after}, count=500, block=block_ms)
        rows = reply[0][1] if reply else []
        for event_id, fields in rows:
            self.facts.append(fact_of(event_id, fields))
            self.num_trained += len(self.facts[-1].names) if self.facts[-1].kind == "claimed" else 0
        return len(rows)

    def _find_undone(self) -> None:
        while self.facts:
            last = self.facts[-1].event_id
            found: Any = self._client.xrevrange(self._stream, last, "-", count=1)
            kept = place_of(found[0][0].decode()) if found else (0, 0)
            if kept == place_of(last):
                return
            while self.facts and place_of(self.facts[-1].event_id) > kept:
                self.undone.append(self.facts.pop())


def lives_of(facts: list[Fact]) -> dict[str, str]:
    """Return for each rollout its life, a letter an event: see `LIFE`."""
    lives: defaultdict[str, str] = defaultdict(str)
    for fact in facts:
        for name, letter in _letters(fact, lives):
            lives[name] += letter
    return dict(lives)


def _letters(fact: Fact, lives: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    letter = LETTERS.get(fact.kind, "")
    for name in fact.names if letter else ():
        # a failed request's event names all of its records, those that came too
        if not name.startswith("foreign:") and not (letter == "f" and "p" in lives.get(name, "")):
            yield name, letter


def sums_of(facts: list[Fact], lives: Mapping[str, str]) -> Counter[str]:
    """Return what the counters of the broker should say."""
    sums = Counter[str]()
    for fact in facts:
        if fact.kind in ("pushed", "matched", "evaluated"):
            sums[fact.kind] += len(fact.names)
        elif fact.kind == "dropped":
            sums[f"dropped:{fact.reason}"] += len(fact.names)
        elif fact.kind == "claimed":
            sums["claimed_segments"] += len(fact.names)
        elif fact.kind == "packed":
            sums["packed_segments"] += len(fact.names)
        elif fact.kind in ("rejected", "quarantined"):
            sums["rejected"] += len(fact.names)
    sums["requested"] = sum(life.startswith("a") for life in lives.values())
    sums["rejected"] += sum(life.endswith("f") for life in lives.values())
    return sums


def claims_of(facts: list[Fact]) -> dict[tuple[int, int], str]:
    """Return the ids of each (optimizer step, rank), in order."""
    claims: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for fact in facts:
        for rank, ids in fact.by_rank:
            claims[fact.step, rank] += ids.split()
    return {place: " ".join(names) for place, names in claims.items()}
