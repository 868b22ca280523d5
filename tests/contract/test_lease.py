"""One holder at a time: a second one is refused and told who holds it, a frozen one can write nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker_schemas.broker import lease as leases
from broker_schemas.broker.broker import Broker, Fence
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.lease import Lease, holding, is_gone, own_holder
from broker_schemas.errors import ConfigError, PlaceTaken
from rollstream.bench.queue_throughput import make_rollouts, push_match_and_pack
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_reading import EVENTS_FILE
from tests.builders.settings import claim_settings
from tests.source_tree import script_names


def held_elsewhere(broker: Broker, role: leases.SoleRole, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """Return a lease that a living process of another machine holds."""
    with monkeypatch.context() as patch:
        patch.setattr(
            leases, "own_holder", lambda: {"host": "elsewhere", "pid": 7, "machine": "x", "started": "1"}
        )
        return Lease.take(broker, role)


@pytest.mark.req("Q-19")
def test_a_second_holder_is_refused_and_told_who_holds_the_place(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held_elsewhere(broker, "packer", monkeypatch)

    with pytest.raises(ConfigError, match="packer of run .*: process 7 on elsewhere holds this place"):
        Lease.take(broker, "packer", pause=lambda _: first.keep())


@pytest.mark.req("Q-19")
def test_places_of_other_roles_and_runs_are_free(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    held_elsewhere(broker, "packer", monkeypatch)

    assert Lease.take(broker, "archive").token > 0


@pytest.mark.req("Q-19")
def test_a_place_given_back_or_whose_lease_ended_is_taken_with_a_greater_token(broker: Broker) -> None:
    first = Lease.take(broker, "learner")
    first.release()
    second = Lease.take(broker, "learner", lease_ms=1)
    third = Lease.take(broker, "learner")

    assert first.token < second.token < third.token


@pytest.mark.req("Q-19")
def test_the_place_of_a_process_that_was_killed_here_is_free_at_once(broker: Broker) -> None:
    """Given a holder of this machine that ended without a word, when it is started again."""
    code = "import json; from broker_schemas.broker.lease import own_holder; print(json.dumps(own_holder()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    broker.client.hset(
        broker.keys.named("lease:packer"),
        mapping={"token": 5, "holder": said, "until_ms": 1 << 52},
    )

    assert is_gone(json.loads(said))
    assert not is_gone(own_holder())
    assert Lease.take(broker, "packer", pause=pytest.fail).token > 5


@pytest.mark.req("Q-19")
@pytest.mark.parametrize("script", sorted(set(script_names()) - {"hold_lease"}))
def test_no_script_of_a_holder_that_was_replaced_changes_anything(script: str, broker: Broker) -> None:
    """Given a role that was frozen until another took its place, when it is thawed in any transition."""
    frozen = Lease.take(broker, "learner", lease_ms=1)
    Lease.take(broker, "learner")
    late = broker.fenced(Fence(role="learner", token=frozen.token))
    before = sorted(broker.client.scan_iter("*"))
    events = broker.client.xlen(broker.keys.named("events"))

    with pytest.raises(PlaceTaken, match=f"process {os.getpid()} on"):
        late.run(script, ["a", "b", "c", "d", "e"], [0] * 20)

    assert sorted(broker.client.scan_iter("*")) == before
    assert broker.client.xlen(broker.keys.named("events")) == events
    with pytest.raises(PlaceTaken, match="nothing more is written here"):
        frozen.keep()


@pytest.mark.req("Q-19")
def test_a_holder_goes_on_where_nobody_took_its_place_or_the_broker_forgot_it(broker: Broker) -> None:
    lease = Lease.take(broker, "learner", lease_ms=1)
    held = broker.fenced(Fence(role="learner", token=lease.token))

    lease.keep()
    held.run("publish_policy", ["policy"], [1, 0, "w", ""])
    broker.client.delete(broker.keys.named("lease:learner"))
    held.run("publish_policy", ["policy"], [2, 1, "w", ""])
    lease.keep()

    assert broker.client.hget(broker.keys.named("lease:learner"), "token") == str(lease.token).encode()


@pytest.mark.req("Q-19")
def test_the_block_of_a_role_ends_when_its_place_is_taken(broker: Broker) -> None:
    lost = threading.Event()

    def role() -> None:
        with holding(broker, "packer", on_loss=lost.set, lease_ms=30):
            key = broker.keys.named("lease:packer")
            broker.client.hset(key, mapping={"token": 1 << 52, "holder": "{}", "until_ms": 1 << 52})
            assert lost.wait(timeout=30)

    with pytest.raises(PlaceTaken):
        role()
    assert broker.client.hget(broker.keys.named("lease:packer"), "token") == str(1 << 52).encode()


@pytest.mark.req("Q-19")
def test_a_role_that_ends_gives_its_place_back(broker: Broker) -> None:
    with holding(broker, "packer", on_loss=pytest.fail) as (held, lease):
        assert held.fence == Fence(role="packer", token=lease.token)

    assert Lease.take(broker, "packer", pause=pytest.fail).token > lease.token


@pytest.mark.req("Q-19", "Q-20")
def test_a_thawed_archive_appends_nothing(real_broker: Broker, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    frozen = Lease.take(real_broker, "archive", lease_ms=1)
    old = ArchiveWriter(
        real_broker.fenced(Fence(role="archive", token=frozen.token)), folder, confirm=frozen.keep
    )
    push_match_and_pack(real_broker, make_rollouts(random.Random(1), 4, num_tokens=30, prefix="a"))
    Lease.take(real_broker, "archive")
    before = (folder / EVENTS_FILE).read_bytes()

    with pytest.raises(PlaceTaken):
        old.step(block_ms=1)

    assert (folder / EVENTS_FILE).read_bytes() == before
    old.close()


@pytest.mark.req("Q-19")
def test_a_thawed_learner_commits_and_claims_nothing(real_broker: Broker) -> None:
    push_match_and_pack(real_broker, make_rollouts(random.Random(1), 8, num_tokens=30, prefix="a"))
    frozen = Lease.take(real_broker, "learner", lease_ms=1)
    fence = Fence(role="learner", token=frozen.token)
    old = LearnerDoor(real_broker.fenced(fence), claim_settings(world_size=1, mode="wait"))
    old.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)
    Lease.take(real_broker, "learner")

    for late in (
        lambda: old.commit_step(optimizer_step=0, summary={"loss": 1.0}),
        lambda: old.claim_step(optimizer_step=1, scheduled_kind="B", policy_version=0),
        lambda: old.settle_checkpoint(optimizer_step=1),
        lambda: old.publish_policy(policy_version=1, optimizer_step=1, weights_path="w"),
    ):
        with pytest.raises(PlaceTaken):
            late()
