"""Each transition: what it changes, what it answers when repeated, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackCommit, PackerDoor, PlannedPack
from broker_schemas.broker.policy import publish_policy, read_policy
from broker_schemas.broker.rollout_requests import (
    RolloutRequest,
    fail_request,
    issue_requests,
    read_cursor,
    reissue_expired,
    release_lease,
    renew_lease,
)
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, SinkSettings
from broker_schemas.errors import BrokerFull, RunStopped
from broker_schemas.records.packs import ReadyPack
from tests.builders.records import a_rollout, a_segment
from tests.builders.settings import claim_settings, lease_settings

LEASE = lease_settings(lease_ms=60_000, max_attempts=2)


def a_request(number: int = 1, num_samples: int = 2) -> RolloutRequest:
    return RolloutRequest(
        request_id=f"r-{number}", samples=tuple((i, 7) for i in range(num_samples)), policy_version=0
    )


def push(broker: Broker, *record_ids: str, version: int = 0) -> list[str]:
    return list(SegmentSink(broker).push([a_rollout(name, policy_version=version) for name in record_ids]))


def match_all(
    broker: Broker, *, oldest: int = 0, num_tokens: int = 20, optimizer_step: int = -1
) -> list[str]:
    door = MatcherDoor(broker, "matcher-0")
    entries = door.read(count=100, block_ms=1)
    verdicts = [
        MatchVerdict(
            entry=entry,
            outcome="matched",
            segment=a_segment(
                entry.record_id,
                num_tokens,
                policy_version=entry.policy_version,
                optimizer_step=optimizer_step,
            ),
        )
        for entry in entries
    ]
    return door.commit(verdicts, oldest_policy_version=oldest)


def pack_all(
    broker: Broker, ranks: Sequence[int], *, oldest: int = 0, queue_limit: int = 8, sealed_step: int = -1
) -> PackCommit:
    """One segment a pack, to ``ranks`` in order."""
    door = PackerDoor(broker)
    pending = door.read(count=100, block_ms=1)
    planned = [
        PlannedPack(
            rank=rank,
            pack=ReadyPack(
                pack_id=f"p-{item.descriptor.record_id}",
                record_ids=(item.descriptor.record_id,),
                lengths=(item.descriptor.encoded_length,),
                policy_version=item.descriptor.policy_version,
                fill=0.5,
            ),
            entry_ids=(item.entry_id,),
        )
        for rank, item in zip(ranks, pending, strict=True)
    ]
    return door.commit(
        planned, oldest_policy_version=oldest, queue_limit=queue_limit, sealed_step=sealed_step
    )


def ready_packs(broker: Broker, *record_ids: str, ranks: Sequence[int], version: int = 0) -> None:
    push(broker, *record_ids, version=version)
    match_all(broker)
    pack_all(broker, ranks)


def a_learner(broker: Broker, **changes: object) -> LearnerDoor:
    settings = {"world_size": 2, "packs_per_rank": 1, "version_window": 2, **changes}
    return LearnerDoor(broker, claim_settings(**settings))  # type: ignore[arg-type]


@pytest.mark.req("Q-4")
def test_a_rollout_is_admitted_once_however_often_it_is_pushed(broker: Broker) -> None:
    assert push(broker, "a", "b") == ["ok", "ok"]
    assert push(broker, "b", "c") == ["duplicate", "ok"]
    status = read_status(broker, 1)
    assert (status.total("pushed"), status.total("duplicates"), status.segments_waiting) == (3, 1, 3)


@pytest.mark.req("Q-4")
def test_an_id_is_recognised_for_at_least_the_dedup_window(broker: Broker) -> None:
    sink = SegmentSink(broker, SinkSettings(dedup_window=4))
    names = [f"a-{i}" for i in range(8)]
    for name in names:
        sink.push([a_rollout(name)])
    assert [sink.push([a_rollout(name)])[0] for name in names[-4:]] == ["duplicate"] * 4


@pytest.mark.req("Q-12")
def test_a_full_broker_takes_nothing_and_says_so(broker: Broker) -> None:
    sink = SegmentSink(broker, SinkSettings(max_bytes=len(a_rollout().encode_body()) + 60))
    sink.push([a_rollout("a")])
    with pytest.raises(BrokerFull, match="bytes in use"):
        sink.push([a_rollout("b")])
    assert read_status(broker, 1).segments_waiting == 1


@pytest.mark.req("Q-13")
@pytest.mark.parametrize("name", ["", "a b", "a\tb", "x" * 201])
def test_an_id_that_could_break_the_log_is_refused(broker: Broker, name: str) -> None:
    assert push(broker, name) == ["bad_id"]
    assert read_status(broker, 1).segments_waiting == 0


@pytest.mark.req("Q-14", "Q-16")
def test_requests_open_once_and_close_when_all_their_records_came(broker: Broker) -> None:
    assert issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=LEASE)
    assert read_status(broker, 1).outstanding == 2
    SegmentSink(broker).push([a_rollout("r-1.0", request_id="r-1")])
    assert renew_lease(broker, "r-1", LEASE)
    SegmentSink(broker).push([a_rollout("r-1.1", request_id="r-1")])
    assert not renew_lease(broker, "r-1", LEASE)
    status = read_status(broker, 1)
    assert (status.total("open_records"), status.outstanding) == (0, 2)


@pytest.mark.req("Q-16")
def test_a_second_dispatcher_with_an_old_position_changes_nothing(broker: Broker) -> None:
    assert issue_requests(broker, [a_request(1)], cursor=0, next_cursor=2, lease=LEASE)
    assert not issue_requests(broker, [a_request(2)], cursor=0, next_cursor=2, lease=LEASE)
    assert read_cursor(broker) == 2
    assert read_status(broker, 1).total("requested") == 2


@pytest.mark.req("Q-4")
def test_a_request_whose_lease_ended_is_run_again_then_given_up(broker: Broker) -> None:
    over = lease_settings(lease_ms=-1, max_attempts=2)
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=over)
    assert renew_lease(broker, "r-1", over)
    again = reissue_expired(broker, over)
    assert [(item.request, item.attempt, item.waits) for item in again] == [(a_request(), 2, False)]
    assert renew_lease(broker, "r-1", over)
    assert reissue_expired(broker, over) == []
    status = read_status(broker, 1)
    assert (status.total("open_records"), status.by_reason("rejected")) == (0, {"abandoned": 2})


@pytest.mark.req("O-5", "Q-4")
def test_a_request_that_no_worker_has_taken_is_never_given_up(broker: Broker) -> None:
    over = lease_settings(lease_ms=-1, max_attempts=1)
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=over)
    for _ in range(5):
        assert [(item.attempt, item.waits) for item in reissue_expired(broker, over)] == [(1, True)]
    assert read_status(broker, 1).total("open_records") == 2


@pytest.mark.req("O-5", "Q-4")
def test_a_request_that_its_worker_gave_back_waits_without_a_lease(broker: Broker) -> None:
    over = lease_settings(lease_ms=-1, max_attempts=1)
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=over)
    assert renew_lease(broker, "r-1", over)
    assert release_lease(broker, "r-1", over)
    assert [(item.attempt, item.waits) for item in reissue_expired(broker, over)] == [(1, True)]
    assert not release_lease(broker, "r-2", over)


@pytest.mark.req("Q-4")
def test_asking_for_rollouts_said_again_answers_as_the_first_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker_schemas.broker.rollout_requests.secrets.token_hex", lambda _: "one-call")
    for _ in range(2):
        assert issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=LEASE)
    assert (read_cursor(broker), read_status(broker, 1).total("requested")) == (2, 2)
    monkeypatch.setattr("broker_schemas.broker.rollout_requests.secrets.token_hex", lambda _: "another")
    assert not issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=LEASE)


@pytest.mark.req("Q-4")
def test_a_rollout_of_a_closed_request_comes_too_late(broker: Broker) -> None:
    issue_requests(broker, [a_request()], cursor=0, next_cursor=2, lease=LEASE)
    assert fail_request(broker, "r-1", reason="generation_failed", detail="no memory\nat all") == 2
    assert fail_request(broker, "r-1", reason="generation_failed", detail="again") == 0
    assert SegmentSink(broker).push([a_rollout("r-1.0", request_id="r-1")]) == ["late"]


@pytest.mark.req("Q-4", "Q-2")
def test_two_matchers_with_the_same_rollout_commit_it_once(broker: Broker) -> None:
    push(broker, "a")
    first, second = MatcherDoor(broker, "m-0", idle_ms=0), MatcherDoor(broker, "m-1", idle_ms=0)
    held = first.read(count=10, block_ms=1)
    taken = second.found_again(0.0, count=10)
    assert [entry.record_id for entry in taken] == ["a"]
    verdicts = [MatchVerdict(entry=entry, outcome="matched", segment=a_segment("a")) for entry in held]
    assert second.commit(verdicts, oldest_policy_version=0) == ["matched"]
    assert first.commit(verdicts, oldest_policy_version=0) == ["gone"]
    assert read_status(broker, 1).matched_waiting == 1


@pytest.mark.req("Q-4")
def test_a_matcher_that_comes_back_finds_what_it_held(broker: Broker) -> None:
    push(broker, "a", "b")
    MatcherDoor(broker, "m-0").read(count=1, block_ms=1)
    assert [entry.record_id for entry in MatcherDoor(broker, "m-0").found_again(0.0, count=10)] == ["a"]


@pytest.mark.req("Q-5", "Q-17")
def test_a_stale_rollout_is_dropped_and_counted_on_admission(broker: Broker) -> None:
    push(broker, "a", version=1)
    assert match_all(broker, oldest=2) == ["dropped"]
    status = read_status(broker, 1)
    assert status.by_reason("dropped") == {"stale": 1}
    assert status.total("bytes") == 0


@pytest.mark.req("Q-13")
def test_a_poison_record_is_kept_with_its_reason_and_raw_bytes(broker: Broker) -> None:
    broker.client.xadd(broker.keys.named("segments"), {"record_id": "bad", "body": b"\xc1\x00"})
    door = MatcherDoor(broker, "m-0")
    (entry,) = door.read(count=10, block_ms=1)
    verdict = MatchVerdict(entry=entry, outcome="rejected", reason="malformed", detail="not msgpack")
    assert door.commit([verdict], oldest_policy_version=0) == ["rejected"]
    ((_, fields),) = broker.client.xrange(broker.keys.named("rejected"))
    assert (fields[b"raw"], fields[b"reason"]) == (b"\xc1\x00", b"malformed")


@pytest.mark.req("Q-6", "Q-17")
def test_a_full_ready_queue_drops_its_oldest_pack_with_its_payload(broker: Broker) -> None:
    push(broker, "a", "b", "c")
    match_all(broker)
    commit = pack_all(broker, [0, 0, 0], queue_limit=2)
    status = read_status(broker, 1)
    assert (commit.num_packs, commit.num_overflow, status.ready_depths) == (3, 1, (2,))
    assert status.by_reason("dropped") == {"overflow": 1}
    assert not broker.client.exists(broker.keys.payload("a"))
    assert broker.client.exists(broker.keys.payload("b"))


@pytest.mark.req("Q-2")
def test_a_pack_of_a_segment_that_is_gone_changes_nothing(broker: Broker) -> None:
    push(broker, "a", "b")
    match_all(broker)
    door = PackerDoor(broker)
    one, two = door.read(count=10, block_ms=1)
    assert door.drop([(one.entry_id, "a")], reason="stale") == 1
    pack = ReadyPack(pack_id="p", record_ids=("a", "b"), lengths=(20, 20), policy_version=0, fill=1.0)
    planned = PlannedPack(rank=0, pack=pack, entry_ids=(one.entry_id, two.entry_id))
    assert door.commit([planned], oldest_policy_version=0, queue_limit=8).gone == ("a",)
    assert read_status(broker, 1).matched_waiting == 1


@pytest.mark.req("Q-8", "Q-7")
def test_a_claim_takes_packs_for_every_rank_and_answers_the_same_again(broker: Broker) -> None:
    ready_packs(broker, "a", "b", "c", ranks=[0, 1, 0])
    learner = a_learner(broker)
    claim = learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert [[pack.record_ids for pack in packs] for packs in claim.packs] == [[("a",)], [("b",)]]
    assert (claim.kind, claim.num_segments) == ("B", 2)
    assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) == claim
    assert a_learner(broker).claim_step(optimizer_step=0, scheduled_kind="B", policy_version=5) == claim
    assert read_status(broker, 2).ready_depths == (1, 0)


@pytest.mark.req("Q-5", "Q-16")
def test_a_claim_takes_the_packs_that_are_stale_soonest(broker: Broker) -> None:
    learner = a_learner(broker, world_size=1)
    ready_packs(broker, "young", ranks=[0], version=2)
    ready_packs(broker, "old", ranks=[0], version=1)
    ready_packs(broker, "old-too", ranks=[0], version=1)

    taken = [
        learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=3) for step in range(3)
    ]

    assert [claim.packs[0][0].pack_id for claim in taken if claim] == ["p-old", "p-old-too", "p-young"]


@pytest.mark.req("Q-7", "Q-8")
def test_a_short_rank_makes_the_step_a_and_takes_nothing(broker: Broker) -> None:
    ready_packs(broker, "a", ranks=[0])
    learner = a_learner(broker)
    claim = learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert (claim.kind, claim.reason, claim.short_ranks, claim.packs) == ("A", "queue_short", (1,), ())
    ready_packs(broker, "b", ranks=[1])
    assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) == claim
    assert read_status(broker, 2).ready_depths == (1, 1)


@pytest.mark.req("Q-7")
def test_in_wait_mode_a_short_queue_is_no_decision(broker: Broker) -> None:
    ready_packs(broker, "a", ranks=[0])
    learner = a_learner(broker, mode="wait")
    assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) is None
    ready_packs(broker, "b", ranks=[1])
    assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) is not None


@pytest.mark.req("Q-5", "Q-17")
def test_stale_packs_are_dropped_on_all_ranks_before_a_claim(broker: Broker) -> None:
    ready_packs(broker, "a", "b", ranks=[0, 1], version=0)
    ready_packs(broker, "c", "d", ranks=[0, 1], version=3)
    claim = a_learner(broker).claim_step(optimizer_step=9, scheduled_kind="B", policy_version=3)
    assert claim is not None
    assert claim.record_ids == ("c", "d")
    assert read_status(broker, 2).by_reason("dropped") == {"stale": 2}


@pytest.mark.req("Q-5", "Q-16")
def test_stale_packs_are_gone_from_the_depth_after_a_ground_truth_step(broker: Broker) -> None:
    ready_packs(broker, "a", "b", "c", ranks=(0, 0, 1), version=1)
    learner = a_learner(broker, version_window=2)
    fresh = learner.claim_step(optimizer_step=0, scheduled_kind="A", policy_version=3)
    assert read_status(broker, 2).ready_depths == (2, 1)
    learner.claim_step(optimizer_step=1, scheduled_kind="A", policy_version=4)
    status = read_status(broker, 2)
    assert fresh is not None
    assert (status.ready_depths, status.by_reason("dropped")) == ((0, 0), {"stale": 3})
    assert status.total("bytes") == 0


@pytest.mark.req("S-7")
def test_a_sealed_step_gives_every_rank_all_its_packs(broker: Broker) -> None:
    learner = a_learner(broker, mode="sealed", num_rollouts=3)
    assert learner.claim_step(optimizer_step=4, scheduled_kind="B", policy_version=0) is None
    open_step = read_status(broker, 2).open_step
    assert open_step is not None
    assert (open_step.optimizer_step, open_step.num_rollouts) == (4, 3)
    push(broker, "a", "b", "c")
    match_all(broker)
    pack_all(broker, [0, 0, 1], sealed_step=4)
    claim = learner.claim_step(optimizer_step=4, scheduled_kind="B", policy_version=0)
    assert claim is not None
    assert [len(packs) for packs in claim.packs] == [2, 1]


@pytest.mark.req("Q-10")
def test_a_claim_is_freed_only_when_a_checkpoint_covers_it(broker: Broker) -> None:
    ready_packs(broker, "a", "b", "c", "d", ranks=[0, 1, 0, 1])
    learner = a_learner(broker)
    for optimizer_step in (0, 1):
        learner.claim_step(optimizer_step=optimizer_step, scheduled_kind="B", policy_version=0)
        learner.commit_step(optimizer_step=optimizer_step, summary={"loss": 1.0})
        learner.commit_step(optimizer_step=optimizer_step, summary={"loss": 1.0})
    assert read_status(broker, 2).total("trained_segments") == 4
    learner.settle_checkpoint(optimizer_step=1)
    assert not broker.client.exists(broker.keys.payload("a"))
    assert [segment.record_id for segment in learner.fetch_segments(["c", "d"])] == ["c", "d"]
    with pytest.raises(RunStopped, match="a checkpoint covers it"):
        learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    learner.settle_checkpoint(optimizer_step=2)
    status = read_status(broker, 2)
    assert (status.open_claims, status.total("bytes")) == (0, 0)


@pytest.mark.req("Q-15")
def test_nothing_is_freed_before_the_archive_has_passed_it(broker: Broker) -> None:
    ready_packs(broker, "a", "b", ranks=[0, 1])
    learner = a_learner(broker, archived_only=True)
    learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    learner.settle_checkpoint(optimizer_step=1)
    assert broker.client.exists(broker.keys.payload("a"))
    last = broker.client.xrevrange(broker.keys.named("events"), count=1)[0][0]
    broker.run("advance_archive", ["archive"], [last, 100])
    learner.settle_checkpoint(optimizer_step=1)
    assert not broker.client.exists(broker.keys.payload("a"))


@pytest.mark.req("V-6")
def test_policy_versions_only_grow(broker: Broker) -> None:
    assert read_policy(broker) is None
    assert publish_policy(broker, policy_version=0, optimizer_step=-1, weights_path="/w/v0")
    assert publish_policy(broker, policy_version=2, optimizer_step=1, weights_path="/w/v2")
    assert not publish_policy(broker, policy_version=1, optimizer_step=0, weights_path="/w/v1")
    policy = read_policy(broker)
    assert policy is not None
    assert (policy.policy_version, policy.weights_path) == (2, "/w/v2")
