"""A plain-Python model of the queue: what each transition must do, told again without Redis or Lua."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from broker_schemas.records.packs import StepClaim

WORLD_SIZE = 2
RESULT_BYTES = 1


def lane_of(purpose: str) -> str:
    """Return where rollouts of a purpose are counted."""
    return "evaluation_" if purpose == "evaluation" else ""


@dataclass
class ModelRollout:
    """One rollout; ``stage`` and ``reason`` as the ledger names them."""

    stage: str
    purpose: str = "train"
    reason: str = ""
    policy_version: int = -1


@dataclass
class ModelRequest:
    """An open request; ``is_over``: its time has come; ``is_taken``: a worker had it since it was opened."""

    record_ids: tuple[str, ...]
    remaining: int
    is_over: bool
    attempt: int = 1
    is_taken: bool = False


@dataclass(frozen=True)
class ModelPack:
    """A pack and the lowest version of its segments."""

    pack_id: str
    rank: int
    ids: tuple[str, ...]
    policy_version: int


@dataclass
class ModelClaim:
    """A decided step; ``answer`` is what the door said first."""

    kind: str
    packs: list[ModelPack]
    answer: StepClaim
    is_committed: bool = False
    out: set[str] = field(default_factory=set)

    @property
    def ids(self) -> list[str]:
        return [name for pack in self.packs for name in pack.ids]


@dataclass
class QueueModel:
    """The whole state. Streams are dicts in stream order: name -> consumer that holds it, None: unread."""

    rollouts: dict[str, ModelRollout] = field(default_factory=dict)
    requests: dict[str, ModelRequest] = field(default_factory=dict)
    closed_records: dict[str, str] = field(default_factory=dict)
    segments: dict[str, str | None] = field(default_factory=dict)
    matched: dict[str, str | None] = field(default_factory=dict)
    ready: list[list[ModelPack]] = field(default_factory=lambda: [[] for _ in range(WORLD_SIZE)])
    sealed: dict[int, int] = field(default_factory=dict)
    claims: dict[int, ModelClaim] = field(default_factory=dict)
    settled_steps: int = 0
    covered_steps: int = 0
    next_step: int = 0
    policy_version: int = -1
    cursor: int = 0
    seen: set[str] = field(default_factory=set)
    body_bytes: dict[str, int] = field(default_factory=dict)
    line_bytes: dict[str, int] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)
    result_bytes: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        held = (self.body_bytes, self.line_bytes, self.payload_bytes)
        return sum(sum(sizes.values()) for sizes in held) + self.result_bytes

    def issue(self, request_id: str, record_ids: tuple[str, ...], *, purpose: str, is_over: bool) -> None:
        self.requests[request_id] = ModelRequest(record_ids, len(record_ids), is_over)
        for name in record_ids:
            self.rollouts[name] = ModelRollout("requested", purpose)
        self.counters[f"{lane_of(purpose)}requested"] += len(record_ids)
        self.counters[f"{lane_of(purpose)}open_records"] += len(record_ids)

    def renew(self, request_id: str, *, is_over: bool, is_held: bool) -> bool:
        request = self.requests.get(request_id)
        if request is not None:
            request.is_over, request.is_taken = is_over, is_held
        return request is not None

    def fail(self, request_id: str, reason: str) -> int:
        request = self.requests.pop(request_id, None)
        if request is None:
            return 0
        for name in request.record_ids:
            if self.rollouts[name].stage == "requested":
                self.rollouts[name].stage, self.rollouts[name].reason = "rejected", reason
                self.closed_records[name] = request_id
        lane = lane_of(self.rollouts[request.record_ids[0]].purpose)
        self.counters[f"{lane}rejected:{reason}"] += request.remaining
        self.counters[f"{lane}open_records"] -= request.remaining
        return request.remaining

    def reissue(self, max_attempts: int, *, is_over: bool) -> list[tuple[str, int, bool]]:
        """Return (request, attempt, whether it only waits) of those whose time has come."""
        found = []
        for request_id, request in list(self.requests.items()):
            if not request.is_over:
                continue
            if request.is_taken and request.attempt >= max_attempts:
                self.fail(request_id, "abandoned")
                continue
            found.append((request_id, request.attempt + request.is_taken, not request.is_taken))
            self.counters["reissued"] += request.is_taken
            request.attempt += request.is_taken
            request.is_over, request.is_taken = is_over, False
        return found

    def push(
        self,
        name: str,
        request_id: str,
        policy_version: int,
        purpose: str,
        num_bytes: int,
        limit: int,
        line_bytes: int,
    ) -> str:
        request = self.requests.get(request_id)
        if num_bytes > limit:
            return "too_large"
        if name in self.seen:
            self.counters["duplicates"] += 1
            return "duplicate"
        if request_id and request is None:
            self.counters["late"] += 1
            return "late"
        if request is not None and name not in request.record_ids:
            return "bad_id"
        self.seen.add(name)
        self.rollouts[name] = ModelRollout("pushed", purpose, policy_version=policy_version)
        self.segments[name] = None
        self.body_bytes[name], self.line_bytes[name] = num_bytes, line_bytes
        self.counters[f"{lane_of(purpose)}pushed"] += 1
        self.counters["evaluation_waiting"] += purpose == "evaluation"
        if request is not None:
            request.remaining -= 1
            self.counters[f"{lane_of(purpose)}open_records"] -= 1
        return "ok"

    def close_complete_requests(self) -> None:
        for request_id in [key for key, request in self.requests.items() if request.remaining == 0]:
            del self.requests[request_id]

    def match(
        self, name: str, outcome: str, reason: str, *, oldest: int, payload_bytes: int, num_tokens: int
    ) -> str:
        if name not in self.segments:
            return "gone"
        del self.segments[name]
        if name.startswith("foreign:"):
            reason = reason if outcome == "rejected" else "not_admitted"
            self.rollouts[name] = ModelRollout("rejected", "foreign", reason)
            self.counters[f"rejected:{reason}"] += 1
            return "rejected"
        del self.body_bytes[name], self.line_bytes[name]
        rollout = self.rollouts[name]
        if outcome == "matched" and rollout.policy_version < oldest:
            outcome, reason = "dropped", "stale"
        rollout.stage, rollout.reason = outcome, reason if outcome in ("dropped", "rejected") else ""
        if outcome == "matched":
            self.matched[name] = None
            self.payload_bytes[name] = payload_bytes
            self.counters["matched_tokens"] += num_tokens
        is_told_by_reason = outcome in ("dropped", "rejected")
        told = f"{lane_of(rollout.purpose)}{outcome}:{reason}"
        self.counters[told if is_told_by_reason else outcome] += 1
        self.counters["evaluation_waiting"] -= rollout.purpose == "evaluation"
        self.result_bytes += RESULT_BYTES * (outcome == "evaluated")
        return outcome

    def drop(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            self.rollouts[name].stage, self.rollouts[name].reason = "dropped", reason
            del self.payload_bytes[name]
            self.counters[f"dropped:{reason}"] += 1

    def drop_matched(self, names: Sequence[str], reason: str) -> int:
        found = [name for name in dict.fromkeys(names) if self.matched.pop(name, "gone") != "gone"]
        self.drop(found, reason)
        return len(found)

    def pack(
        self, packs: Sequence[ModelPack], *, oldest: int, limit: int, sealed_step: int
    ) -> tuple[list[str], tuple[int, int, int]]:
        """Return the segments that are gone, and packs made, stale and overflown."""
        told_before = sealed_step in self.sealed or sealed_step in self.claims
        if sealed_step >= 0 and (told_before or sealed_step < self.settled_steps):
            return [], (0, 0, 0)
        gone = [name for pack in packs for name in pack.ids if name not in self.matched]
        if gone:
            return gone, (0, 0, 0)
        made = stale = overflow = 0
        for pack in packs:
            for name in pack.ids:
                del self.matched[name]
            if pack.policy_version < oldest:
                self.drop(pack.ids, "stale")
                stale += 1
                continue
            for name in pack.ids:
                self.rollouts[name].stage = "packed"
            self.ready[pack.rank].append(pack)
            self.counters["packed"] += 1
            self.counters["packed_segments"] += len(pack.ids)
            made += 1
            if limit and len(self.ready[pack.rank]) > limit:
                self.drop(self.ready[pack.rank].pop(0).ids, "overflow")
                overflow += 1
        if sealed_step >= 0:
            self.sealed[sealed_step] = made
        return [], (made, stale, overflow)

    def claim(
        self, step: int, kind: str, mode: str, *, packs_per_rank: int, oldest: int
    ) -> tuple[str, str, list[ModelPack], tuple[int, ...]] | None:
        """Return kind, reason, packs and short ranks of a step that is not decided yet; None: not yet."""
        if mode != "sealed":
            self.drop_stale_packs(oldest)
        if kind == "A":
            return "A", "schedule", [], ()
        if mode == "sealed":
            if self.sealed.pop(step, None) is None:
                return None
            return "B", "claimed", self._take(None), ()
        short = tuple(rank for rank, packs in enumerate(self.ready) if len(packs) < packs_per_rank)
        if not short:
            return "B", "claimed", self._take(packs_per_rank), ()
        return None if mode == "wait" else ("A", "queue_short", [], short)

    def drop_stale_packs(self, oldest: int) -> None:
        for rank, packs in enumerate(self.ready):
            for pack in packs:
                if pack.policy_version < oldest:
                    self.drop(pack.ids, "stale")
            self.ready[rank] = [pack for pack in packs if pack.policy_version >= oldest]

    def _take(self, num_packs: int | None) -> list[ModelPack]:
        """Take every pack in order, or as many of each rank as asked: those that are stale soonest."""
        taken = []
        for rank, packs in enumerate(self.ready):
            chosen = packs
            if num_packs is not None:
                chosen = sorted(packs, key=lambda pack: pack.policy_version)[:num_packs]
            taken += chosen
            self.ready[rank] = [pack for pack in packs if pack not in chosen]
        return taken

    def decide(self, step: int, packs: list[ModelPack], answer: StepClaim) -> None:
        self.claims[step] = claim = ModelClaim(answer.kind, packs, answer)
        self.next_step = max(self.next_step, step + 1)
        for name in claim.ids:
            self.rollouts[name].stage = "claimed"
        self.counters[f"steps:{answer.kind}"] += 1
        self.counters[f"claims:{answer.reason}"] += 1
        self.counters["claimed_segments"] += len(claim.ids)

    def commit(self, step: int) -> None:
        claim = self.claims.get(step)
        if claim is None or claim.is_committed:
            return
        claim.is_committed = True
        for name in claim.ids:
            assert self.rollouts[name].stage == "claimed", f"{name} is trained a second time"
            self.rollouts[name].stage = "trained"
        self.counters["committed_steps"] += 1
        self.counters["trained_segments"] += len(claim.ids)

    def quarantine(self, step: int, names: Sequence[str]) -> bool:
        """Return whether all of them are out of the claim now; none of them is where one is unknown."""
        claim = self.claims.get(step)
        if claim is None:
            return False
        if step < self.covered_steps:
            return set(names) <= claim.out
        leaving = [name for name in dict.fromkeys(names) if name in claim.ids]
        for name in leaving:
            self.rollouts[name].stage, self.rollouts[name].reason = "rejected", "quarantined_image"
            del self.payload_bytes[name]
        claim.out |= set(leaving)
        claim.packs = [
            replace(pack, ids=tuple(name for name in pack.ids if name not in claim.out))
            for pack in claim.packs
        ]
        claim.answer = claim.answer.without(claim.out)
        self.counters["rejected:quarantined_image"] += len(leaving)
        self.counters["trained_segments"] -= len(leaving) * claim.is_committed
        return set(names) <= claim.out

    def settle(self, num_steps: int) -> None:
        self.covered_steps = max(self.covered_steps, num_steps)
        for step in sorted(self.claims):
            if step < num_steps:
                self.commit(step)
                for name in self.claims.pop(step).ids:
                    del self.payload_bytes[name]
                    self.counters["settled_segments"] += 1
                self.settled_steps = step + 1

    def places(self) -> Mapping[str, str]:
        """Return where in the broker each rollout must be found; ended ones are nowhere."""
        found = {name: "segments" for name in self.segments}
        found |= {name: "matched" for name in self.matched}
        found |= {name: f"ready:{pack.rank}" for packs in self.ready for pack in packs for name in pack.ids}
        found |= {name: f"claim:{step}" for step, claim in self.claims.items() for name in claim.ids}
        return found
