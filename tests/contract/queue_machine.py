"""A hypothesis machine that drives every role's doors, next to the plain-Python model of what they must do.

After every command the broker's state, the fold of its log and the model must be one and the same.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.packer_door import PackCommit, PackerDoor, PendingDescriptor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.rollout_requests import (
    RolloutRequest,
    fail_request,
    issue_requests,
    reissue_expired,
    release_lease,
    renew_lease,
)
from broker_schemas.client import SegmentSink, SinkSettings, segment_line
from broker_schemas.errors import BrokerFull, RunStopped
from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.ledger import Ledger
from tests.builders.records import a_rollout
from tests.builders.settings import claim_settings, lease_settings
from tests.contract.live_state import check_samples, check_sums, read_live_state
from tests.contract.queue_hands import (
    WEIGHTED,
    busiest,
    packs_to_come,
    planned_pack,
    quarantine_some,
    segment_named,
    still_useful,
    take,
    take_over,
    until_empty,
)
from tests.contract.queue_model import WORLD_SIZE, ModelPack, QueueModel

MATCHERS, PACKERS = ("m-0", "m-1"), ("p-0", "p-1")
OVER, FRESH = lease_settings(lease_ms=-1, max_attempts=3), lease_settings(lease_ms=600_000, max_attempts=3)
LARGEST_BODY = 1_000


class QueueMachine(RuleBasedStateMachine):
    """Drives the doors; a crash may fall between any two commands."""

    broker: Broker

    def __init__(self) -> None:
        super().__init__()
        self.broker = self.new_broker()
        self.model = QueueModel()
        self.ledger = Ledger()
        self.names = itertools.count()
        self.num_commands = itertools.count()
        self.matchers: dict[str, MatcherDoor] = {}
        self.entries: dict[str, dict[str, RawEntry]] = {}
        self.held: dict[str, dict[str, PendingDescriptor]] = {"p-0": {}, "p-1": {}}
        for name in MATCHERS:
            self.start_matcher(name)

    def new_broker(self) -> Broker:
        raise NotImplementedError

    def teardown(self) -> None:
        events = list(read_events(self.broker))
        whole = Ledger().apply(events)
        assert whole == self.ledger
        cut = len(events) // 3
        assert Ledger().apply(events[:cut]).apply(events[cut:]) == whole
        check_samples(self.broker, events)
        self.broker.client.unlink(*self.broker.client.scan_iter(self.broker.keys.prefix + "*"), "x")
        self.broker.close()

    @rule(seed=st.integers(0, (1 << 32) - 1))
    def run_command(self, seed: int) -> None:
        """Run a command; the number of commands goes in, for hypothesis likes to draw one seed many times."""
        rng = random.Random(f"{seed}:{next(self.num_commands)}")
        command = rng.choice(WEIGHTED)
        note(command)
        getattr(self, command)(rng)

    # dispatcher

    def issue(self, rng: random.Random) -> None:
        model, is_over, is_behind = self.model, rng.random() < 0.3, rng.random() < 0.1
        purpose: Any = rng.choice(["train", "train", "evaluation"])
        requests = [
            RolloutRequest(
                request_id=f"r-{next(self.names)}",
                samples=tuple((index, 1) for index in range(rng.randint(1, 3))),
                policy_version=0,
                purpose=purpose,
            )
            for _ in range(rng.randint(1, 2))
        ]
        num = sum(len(request.samples) for request in requests)
        cursor = model.cursor - (is_behind and model.cursor > 0)
        lease = OVER if is_over else FRESH
        opened = issue_requests(self.broker, requests, cursor=cursor, next_cursor=cursor + num, lease=lease)
        assert opened == (cursor == model.cursor)
        if opened:
            model.cursor += num
            for request in requests:
                model.issue(request.request_id, request.record_ids, purpose=purpose, is_over=is_over)

    def reissue(self, rng: random.Random) -> None:
        is_over = rng.random() < 0.5
        again = reissue_expired(self.broker, OVER if is_over else FRESH)
        found = sorted((item.request.request_id, item.attempt, item.waits) for item in again)
        assert found == sorted(self.model.reissue(OVER.max_attempts, is_over=is_over))

    def renew(self, rng: random.Random) -> None:
        name = rng.choice(["r-0", *self.model.requests])
        is_over, is_held = rng.random() < 0.6, rng.random() < 0.8
        say = renew_lease if is_held else release_lease
        told = say(self.broker, name, OVER if is_over else FRESH)
        assert told == self.model.renew(name, is_over=is_over, is_held=is_held)

    def fail(self, rng: random.Random) -> None:
        name = rng.choice(["r-0", *self.model.requests])
        given_up = fail_request(self.broker, name, reason="generation_failed", detail="no\nmemory")
        assert given_up == self.model.fail(name, "generation_failed")

    # producers

    def push(self, rng: random.Random) -> None:
        records, expected, sizes = [], [], dict[str, int]()
        for name, request_id in [self.push_target(rng) for _ in range(rng.randint(1, 8))]:
            known = self.model.rollouts.get(name)
            purpose = known.purpose if known else "train"
            version = max(0, self.model.policy_version - rng.randint(0, 3))
            padding = {"producer": "x" * 900} if rng.random() < 0.05 else {}
            record = a_rollout(
                name, request_id=request_id, policy_version=version, purpose=purpose, **padding
            )
            records.append(record)
            size = sizes.setdefault(name, len(record.encode_body()))  # the first body of an id counts
            line = len(segment_line(record).encode())
            expected.append(self.model.push(name, request_id, version, purpose, size, LARGEST_BODY, line))
        self.model.close_complete_requests()
        sink = SegmentSink(self.broker, SinkSettings(max_record_bytes=LARGEST_BODY))
        assert sink.push(records) == expected

    def push_target(self, rng: random.Random) -> tuple[str, str]:
        """Return record and request id: new, asked for, pushed before, too late, or nobody's."""
        model = self.model
        waiting = [
            (name, request_id)
            for request_id, request in model.requests.items()
            for name in request.record_ids
            if model.rollouts[name].stage == "requested"
        ]
        choices = [(f"f-{next(self.names)}", "")]
        choices += [(f"f-{next(self.names)}", "")] + 2 * rng.sample(waiting, min(3, len(waiting)))
        choices += [(name, "") for name in rng.sample(sorted(model.seen), min(1, len(model.seen)))]
        choices += rng.sample(sorted(model.closed_records.items()), min(1, len(model.closed_records)))
        if model.requests and rng.random() < 0.1:
            choices = [(f"f-{next(self.names)}", rng.choice(list(model.requests)))]
        return rng.choice(choices)

    def push_into_a_full_broker(self, rng: random.Random) -> None:
        record = a_rollout(f"f-{next(self.names)}")
        sink = SegmentSink(self.broker, SinkSettings(max_bytes=self.model.num_bytes + 10))
        with pytest.raises(BrokerFull):
            sink.push([record])

    def add_past_the_script(self, rng: random.Random) -> None:
        name = rng.choice(["s-0", *self.model.seen])
        fields: dict[Any, Any] = {"kind": "segment", "schema_version": "1", "record_id": name}
        fields |= {"policy_version": "0", "body": a_rollout(name).encode_body()}
        entry: Any = self.broker.client.xadd(self.broker.keys.named("segments"), fields)
        self.model.segments[f"foreign:{entry.decode()}"] = None

    # matchers

    def matcher_reads(self, rng: random.Random) -> None:
        name, count = rng.choice(MATCHERS), rng.randint(1, 12)
        if None not in self.model.segments.values() and rng.random() < 0.9:
            return  # a server takes its time to say that there is nothing
        found = self.hold(name, self.matchers[name].read(count=count, block_ms=1))
        assert found == take(self.model.segments, name, count)

    def matcher_takes_over(self, rng: random.Random) -> None:
        name = rng.choice(MATCHERS)
        look = MatcherDoor(self.broker, name, idle_ms=0).found_again
        found = until_empty(lambda: self.hold(name, look(0.0, count=9)))
        assert {*found} == {*take_over(self.model.segments, name)}

    def matcher_crashes(self, rng: random.Random) -> None:
        self.start_matcher(rng.choice(MATCHERS))

    def start_matcher(self, name: str) -> None:
        """What it held before a crash is what it reads first."""
        self.matchers[name] = MatcherDoor(self.broker, name)
        self.entries[name] = {}
        found = self.hold(name, self.matchers[name].found_again(0.0, count=100))
        assert found == [item for item, owner in self.model.segments.items() if owner == name]

    def hold(self, name: str, entries: list[RawEntry]) -> list[str]:
        named = {
            foreign if (foreign := f"foreign:{entry.entry_id.decode()}") in self.model.segments
            else entry.record_id: entry
            for entry in entries
        }  # fmt: skip
        self.entries[name] = {**still_useful(self.entries[name], self.model.segments), **named}
        return list(named)

    def matcher_commits(self, rng: random.Random) -> None:
        """Commit some of what it holds, also what another took over and committed, also what it committed."""
        name, model = busiest(rng, self.entries), self.model
        held = list(self.entries[name].items())
        oldest = rng.randint(0, max(0, model.policy_version)) if rng.random() < 0.2 else 0
        verdicts, expected = [], []
        chosen = rng.sample(held, rng.choice([len(held), rng.randint(0, len(held))]))
        for item, entry in [*chosen, *chosen[: rng.choice([0, 0, 1])]]:
            outcome: Any = rng.choice(["matched"] * 12 + ["rejected", "dropped"])
            rollout = model.rollouts.get(item)
            if rollout is not None and rollout.purpose == "evaluation" and outcome == "matched":
                outcome = "evaluated"
            reason = {"rejected": "malformed", "dropped": "stale"}.get(outcome, "")
            segment = segment_named(entry.record_id, entry.policy_version)
            verdicts.append(
                MatchVerdict(
                    entry=entry, outcome=outcome, reason=reason, detail="x", segment=segment, result_body=b"r"
                )
            )
            sizes = {"payload_bytes": len(segment.encode_body()), "num_tokens": segment.encoded_length}
            expected.append(model.match(item, outcome, reason, oldest=oldest, **sizes))
        assert self.matchers[name].commit(verdicts, oldest_policy_version=oldest) == expected

    # packers

    def packer_reads(self, rng: random.Random) -> None:
        name, count = rng.choice(PACKERS), rng.randint(1, 12)
        if None not in self.model.matched.values() and rng.random() < 0.9:
            return
        found = PackerDoor(self.broker, name).read(count=count, block_ms=1)
        assert self.keep(name, found) == take(self.model.matched, name, count)

    def packer_takes_over(self, rng: random.Random) -> None:
        name = rng.choice(PACKERS)
        door = PackerDoor(self.broker, name, idle_ms=0)
        held = {item.entry_id for item in self.held[name].values()} if rng.random() < 0.5 else set()
        found = until_empty(lambda: self.keep(name, door.found_again(0.0, count=9, held=held)))
        assert {*found, *(self.held[name] if held else ())} >= {*take_over(self.model.matched, name)}

    def packer_crashes(self, rng: random.Random) -> None:
        name = rng.choice(PACKERS)
        self.held[name], door = {}, PackerDoor(self.broker, name)
        found = door.found_again(0.0, count=100, held=())
        assert self.keep(name, found) == [item for item, owner in self.model.matched.items() if owner == name]

    def keep(self, name: str, found: list[PendingDescriptor]) -> list[str]:
        before = still_useful(self.held[name], self.model.matched)
        self.held[name] = {**before, **{item.descriptor.record_id: item for item in found}}
        return [item.descriptor.record_id for item in found]

    def packer_commits(self, rng: random.Random) -> None:
        name, model = busiest(rng, self.held), self.model
        held = list(self.held[name].values())
        if rng.random() < 0.7:  # most of the time nothing that is gone already
            held = [item for item in held if item.descriptor.record_id in model.matched]
        rng.shuffle(held)
        planned, packs = [], []
        while held and rng.random() < 0.95:
            members = [held.pop() for _ in range(min(len(held), rng.randint(1, 3)))]
            pack = ModelPack(
                pack_id=f"pack-{next(self.names)}",
                rank=rng.randrange(WORLD_SIZE),
                ids=tuple(item.descriptor.record_id for item in members),
                policy_version=min(item.descriptor.policy_version for item in members),
            )
            packs.append(pack)
            planned.append(planned_pack(pack, members))
        oldest = rng.randint(0, max(0, model.policy_version)) if rng.random() < 0.2 else 0
        limit = rng.choice([0, 2, 4])
        sealed_step = rng.choice([model.next_step, rng.randint(0, model.next_step)])
        sealed_step = sealed_step if rng.random() < 0.15 else -1
        done = PackerDoor(self.broker, name).commit(
            planned, oldest_policy_version=oldest, queue_limit=limit, sealed_step=sealed_step
        )
        gone, (made, stale, overflow) = model.pack(packs, oldest=oldest, limit=limit, sealed_step=sealed_step)
        assert done == PackCommit(num_packs=made, num_stale=stale, num_overflow=overflow, gone=tuple(gone))

    def packer_drops(self, rng: random.Random) -> None:
        name = rng.choice(PACKERS)
        chosen = rng.sample(list(self.held[name].values()), min(len(self.held[name]), rng.randint(0, 2)))
        pairs = [(item.entry_id, item.descriptor.record_id) for item in chosen]
        dropped = PackerDoor(self.broker, name).drop(pairs, reason="stale")
        assert dropped == self.model.drop_matched([record_id for _, record_id in pairs], "stale")

    # learner

    def claim(self, rng: random.Random) -> None:
        model = self.model
        kind: Any = rng.choice("A" + 7 * "B")
        mode: Any = rng.choice(["fallback", "wait", "wait", "wait", "sealed"])
        packs_per_rank = rng.choice([1, 1, 2])
        step = model.next_step if rng.random() < 0.8 else rng.randint(0, model.next_step)
        settings_now = claim_settings(
            world_size=WORLD_SIZE,
            packs_per_rank=packs_per_rank,
            version_window=rng.choice([0, 2, 6, 6]),
            mode=mode,
            num_rollouts=rng.choice([0, 2]),
        )
        door, version = LearnerDoor(self.broker, settings_now), max(0, model.policy_version)
        if step < model.settled_steps:
            with pytest.raises(RunStopped):
                door.claim_step(optimizer_step=step, scheduled_kind=kind, policy_version=version)
            return
        coming = packs_to_come(door, step, version)
        answer = door.claim_step(optimizer_step=step, scheduled_kind=kind, policy_version=version)
        if step in model.claims:
            assert answer == model.claims[step].answer
            return
        oldest = oldest_allowed(version, settings_now.version_window)
        expected = model.claim(step, kind, mode, packs_per_rank=packs_per_rank, oldest=oldest)
        assert (answer is None) == (expected is None)
        if answer is not None and expected is not None:
            assert (answer.kind, answer.reason, answer.short_ranks) == (*expected[:2], expected[3])
            assert list(answer.record_ids) == [name for pack in expected[2] for name in pack.ids]
            assert mode == "sealed" or all(pack.policy_version >= oldest for pack in expected[2])
            if answer.kind == "B" and mode != "sealed":  # what was fetched before is what the claim gives
                assert coming == list(answer.packs)
            model.decide(step, expected[2], answer)
            self.fetch(answer.record_ids)

    def fetch(self, record_ids: tuple[str, ...]) -> None:
        found = LearnerDoor(self.broker, claim_settings(world_size=WORLD_SIZE)).fetch_segments(record_ids)
        assert [segment.record_id for segment in found] == list(record_ids)

    def commit_step(self, rng: random.Random) -> None:
        waiting = [step for step, claim in self.model.claims.items() if not claim.is_committed]
        step = rng.choice([*waiting, rng.randint(0, self.model.next_step)])
        LearnerDoor(self.broker, claim_settings(world_size=WORLD_SIZE)).commit_step(
            optimizer_step=step, summary={"loss": 1.0}
        )
        self.model.commit(step)

    def quarantine(self, rng: random.Random) -> None:
        quarantine_some(rng, self.broker, self.model)

    def settle(self, rng: random.Random) -> None:
        num_steps = self.model.settled_steps + rng.randint(-1, 2)
        LearnerDoor(self.broker, claim_settings(world_size=WORLD_SIZE)).settle_checkpoint(
            optimizer_step=num_steps
        )
        self.model.settle(num_steps)

    def publish(self, rng: random.Random) -> None:
        version = max(0, self.model.policy_version + rng.randint(-1, 2))
        is_new = version > self.model.policy_version
        said = publish_policy(self.broker, policy_version=version, optimizer_step=version, weights_path="/w")
        assert said == is_new
        if is_new:
            self.model.policy_version = version
            self.model.counters["policies_published"] += 1

    # what must hold after every command
    @invariant()
    def broker_log_and_model_are_one(self) -> None:
        after = self.ledger.last_event_id
        self.ledger.apply(read_events(self.broker, after="-" if after == "0-0" else after))
        live, model = read_live_state(self.broker), self.model
        assert self.ledger.faults == []
        assert {name: (item.stage, item.reason) for name, item in self.ledger.rollouts.items()} == {
            name: (item.stage, item.reason) for name, item in model.rollouts.items()
        }
        assert live.places == {(name, place): 1 for name, place in model.places().items()}
        assert (live.segments, live.matched) == (model.segments, model.matched)
        assert list(live.segments) == list(model.segments)
        assert live.ready == [[pack.ids for pack in packs] for packs in model.ready]
        assert live.claims == {
            step: (claim.kind, tuple(claim.ids), claim.is_committed) for step, claim in model.claims.items()
        }
        assert live.sealed == model.sealed
        assert live.requests == {name: request.remaining for name, request in model.requests.items()}
        assert live.payload_bytes == model.payload_bytes
        assert live.body_bytes == model.body_bytes
        published = max((version for version, _ in self.ledger.policies), default=-1)
        assert live.policy_version == model.policy_version == published
        check_sums(live, model, self.ledger)
