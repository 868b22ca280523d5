"""FLUSHALL by a neighbour while a run goes on: the roles find out, name the loss, and can go on."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.errors import BrokerError, GroupGone, RunStopped
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_loss import read_losses
from rollstream.watch.broker_snapshot import read_snapshot
from tests.conftest import redis_server_program
from tests.contract.test_lost_replies import a_streaming_packer
from tests.contract.test_transitions import a_learner, match_all, push, ready_packs
from tests.redis_servers import running_server


@pytest.mark.req("Q-14", "Q-12")
@pytest.mark.parametrize("program", [redis_server_program(), shutil.which("redis-server")])
def test_roles_find_their_groups_gone_and_name_the_loss(
    tmp_path: Path, program: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Given a packer whose buffer is full, so that it reads nothing, and a matcher that waits in a read."""
    if program is None:
        pytest.skip("one server alone here")
    with running_server(program, ["--port", "0"], tmp_path / "log") as socket:
        broker = Broker.connect("demo", BrokerAddress(url=f"unix://{socket}"))
        publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
        ready_packs(broker, "t-0", "t-1", ranks=[0, 1])
        learner, archive = a_learner(broker, version_window=9), ArchiveWriter(broker, tmp_path / "archive")
        assert learner.claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0) is not None
        packer = a_streaming_packer(broker, places=3)
        push(broker, "a", "b", "c")
        match_all(broker)
        packer._admit(packer._read(0.0))
        assert packer._buffer.num_free_places == 0
        archive.step(block_ms=1)
        waiting = Reading(MatcherDoor(broker, "m-1"))

        broker.client.flushall()

        assert isinstance(waiting.ended_with(), BrokerError | None)
        with caplog.at_level(logging.ERROR), pytest.raises(GroupGone, match="packer"):
            packer.step(1.0)
        assert "the broker lost what it held of this run" in caplog.text
        assert packer.step(2.0) == 0  # what it held is gone
        publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
        push(broker, "d")
        assert match_all(broker) == ["matched"]
        assert packer.step(9.0) + packer.step(20.0) == 1
        with pytest.raises(RunStopped, match="step 0: the broker no longer knows its claim"):
            learner.claim_step(optimizer_step=1, scheduled_kind="B", policy_version=0)
        while archive.step(block_ms=1):
            pass
        assert len(read_losses(tmp_path / "archive")) == 1
        assert read_snapshot(broker, 2).status.total("pushed") == 1
        assert read_status(broker, 2).total("matched") == 1
        archive.close()
        broker.close()


class Reading:
    """A matcher's read in a thread of its own, under way when this returns."""

    def __init__(self, door: MatcherDoor) -> None:
        self._ended: list[BrokerError | None] = []
        self._thread = threading.Thread(target=self._read, args=(door,))
        self._thread.start()
        clients = door.broker.client
        while not any(client["cmd"] == "xreadgroup" for client in clients.client_list()):  # type: ignore[union-attr]
            time.sleep(0.01)

    def _read(self, door: MatcherDoor) -> None:
        try:
            door.read(count=1, block_ms=2_000)
            self._ended.append(None)
        except BrokerError as exc:
            self._ended.append(exc)

    def ended_with(self) -> BrokerError | None:
        """Return what it raised, None where it found nothing; it must end by itself."""
        self._thread.join(timeout=10)
        return self._ended[0]
