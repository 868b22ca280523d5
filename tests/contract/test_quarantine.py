"""Segments that cannot be trained leave their claim: once, for all who ask, within the sums [Q-13]."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.lease import holding
from broker_schemas.broker.status import read_status
from broker_schemas.errors import ConfigError, RunStopped
from broker_schemas.records.packs import StepClaim, Untrainable
from rollstream.history.audit import take_audit
from rollstream.history.replay_plan import archived_claim
from rollstream.run_folder import RunFolder
from rollstream.stack.quarantining import quarantine_record
from tests.builders.configs import make_mapping, write_file
from tests.contract.test_transitions import a_learner, ready_packs


def broken(*record_ids: str) -> list[Untrainable]:
    return [Untrainable(record_id=n, reason="quarantined_image", detail="no such file") for n in record_ids]


def claimed(broker: Broker) -> StepClaim:
    ready_packs(broker, "a", "b", "c", "d", ranks=(0, 1, 0, 1))
    claim = claim_again(broker)
    assert claim.num_segments == 4
    return claim


def claim_again(broker: Broker) -> StepClaim:
    claim = a_learner(broker, packs_per_rank=2).claim_step(
        optimizer_step=0, scheduled_kind="B", policy_version=0
    )
    assert claim is not None
    return claim


@pytest.mark.req("Q-8", "Q-13")
def test_whoever_asks_again_gets_the_claim_without_what_was_taken_out(broker: Broker) -> None:
    before = claimed(broker)
    for _ in range(2):
        a_learner(broker).quarantine(optimizer_step=0, segments=broken("b"))
        assert claim_again(broker) == before.without({"b"})
    assert [[pack.record_ids for pack in packs] for packs in claim_again(broker).packs] == [
        [("a",), ("c",)],
        [(), ("d",)],
    ]
    letters = broker.client.xrange(broker.keys.named("rejected"))
    assert [(fields[b"record_id"], fields[b"reason"]) for _, fields in letters] == [
        (b"b", b"quarantined_image")
    ]
    assert letters[0][1][b"raw"]
    assert not broker.client.exists(broker.keys.payload("b"))


@pytest.mark.req("Q-13", "Q-14", "Q-15")
@pytest.mark.parametrize("is_committed_before", [False, True])
def test_the_sums_balance_and_a_replay_trains_what_was_left(
    broker: Broker, *, is_committed_before: bool
) -> None:
    claimed(broker)
    door = a_learner(broker)
    if is_committed_before:  # trained, then killed before a checkpoint; the image is gone when it resumes
        door.commit_step(optimizer_step=0, summary={})
    door.quarantine(optimizer_step=0, segments=broken("a", "b"))
    door.commit_step(optimizer_step=0, summary={})
    audit = take_audit(read_events(broker), counters=dict(read_status(broker, 2).counters))
    assert (audit.balanced, audit.faults) == (True, [])
    assert (audit.trained, audit.quarantined, audit.rejected) == (2, 2, {"quarantined_image": 2})
    replayed = archived_claim(audit.ledger, audit.ledger.steps[0], world_size=2, capacity=40)
    assert replayed.record_ids == ("c", "d") == claim_again(broker).record_ids
    door.settle_checkpoint(optimizer_step=1)
    assert read_status(broker, 2).total("bytes") == 0


@pytest.mark.req("Q-10", "Q-13")
def test_what_a_checkpoint_covers_stays_as_it_was_trained(broker: Broker) -> None:
    claimed(broker)
    door = a_learner(broker, archived_only=True)
    door.quarantine(optimizer_step=0, segments=broken("b"))
    door.settle_checkpoint(optimizer_step=1)  # the archive lags: the claim is still there
    door.quarantine(optimizer_step=0, segments=broken("b"))  # out before, said again
    assert read_status(broker, 2).open_claims == 1
    with pytest.raises(RunStopped, match="does not hold a, or a checkpoint covers it"):
        door.quarantine(optimizer_step=0, segments=broken("a"))
    assert claim_again(broker).num_segments == 3


@pytest.mark.req("Q-13")
def test_a_rollout_is_taken_out_by_hand_while_no_learner_holds_its_place(
    real_broker: Broker, redis_url: str, run_name: str, tmp_path: Path
) -> None:
    claimed(real_broker)
    write_file(
        tmp_path,
        make_mapping(run__name=run_name, broker__url=redis_url),
        RunFolder(tmp_path).resolved_config.name,
    )
    with (
        holding(real_broker, "learner", on_loss=lambda: None),
        pytest.raises(ConfigError, match="learner"),
    ):
        quarantine_record(tmp_path, "b", detail="blurred")
    for _ in range(2):
        assert quarantine_record(tmp_path, "b", detail="blurred") == 0
        assert set(claim_again(real_broker).record_ids) == {"a", "c", "d"}
    with pytest.raises(ConfigError, match="no open claim holds it"):
        quarantine_record(tmp_path, "nobody", detail="blurred")
    assert take_audit(read_events(real_broker)).rejected == {"quarantined_by_hand": 1}
