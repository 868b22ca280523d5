"""Weight sync on real servers: what they generate with, and what happens to one that was away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from broker_schemas.broker.broker import Broker
from broker_schemas.errors import RunStopped, ServerFailed, ServerUnavailable
from broker_schemas.rollout_servers.server_group import ServerGroup
from broker_schemas.rollout_servers.server_lock import server_locks
from broker_schemas.rollout_servers.server_sync import ServerSync
from broker_schemas.rollout_servers.vllm_http import VllmServer
from broker_schemas.rollout_servers.weight_sync import load_by_path
from broker_schemas.rollout_servers.weight_transfer import WeightTransfer
from producers.hf_backend import HfBackend
from producers.rollout_backend import Generation
from tests.builders.settings import decoding_settings
from tests.vllm.conftest import MakeBackend, RunningServers, Stage

# long enough that a sync finds it in flight, however quick the machine
LONG = decoding_settings(max_new_tokens=400, temperature=1.0)


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.response_token_ids.tolist() for generation in generations]


@pytest.fixture
def transfer() -> Iterator[WeightTransfer]:
    """Small buckets, so that one bucket holds parts of several layers and a layer lies in several."""
    made = WeightTransfer(device=torch.device("cpu"), timeout_s=60.0, fallback=False, bucket_bytes=1 << 20)
    yield made
    made.close()


def sync_of(
    doors: list[VllmServer],
    broker: Broker,
    mode: str = "wait",
    load_weights: Callable[[VllmServer, str], None] = load_by_path,
) -> ServerSync:
    return ServerSync(
        doors=doors,
        timeout_s=120.0,
        mode="keep" if mode == "keep" else "wait",
        load_weights=load_weights,
        hold=server_locks(broker, wait_s=60.0),
    )


@pytest.mark.req("V-1", "V-2", "V-6")
@pytest.mark.parametrize("way", ["full", "transfer"])
@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_after_each_sync_every_server_generates_with_the_published_weights(
    stage: Stage,
    two_servers: RunningServers,
    make_vllm: MakeBackend,
    make_hf: Callable[[], HfBackend],
    real_broker: Broker,
    transfer: WeightTransfer,
    mode: str,
    way: str,
) -> None:
    doors = two_servers.doors()
    load_weights = transfer if way == "transfer" else load_by_path
    sync, hf = sync_of(doors, real_broker, mode, load_weights), make_hf()
    seen = set()

    for policy_version in (2, 3, 4, 2):
        policy = stage.publish(policy_version)
        sync(policy_version, policy.weights_path)
        hf.follow(policy)
        expected = ids_of(hf.generate(stage.samples[:4], [0] * 4))
        for door in doors:
            assert door.label() == f"{policy_version}:{policy.weights_path}"
            assert not door.is_paused()
            alone = make_vllm(doors=[door])
            alone.follow(policy)
            generations = alone.generate(stage.samples[:4], [0] * 4)
            assert ids_of(generations) == expected
            assert {item.policy_version for item in generations} == {policy_version}
        seen.add(str(expected))

    assert len(seen) == 3, "the versions must differ"


@pytest.mark.req("V-2")
def test_a_strict_sync_waits_for_rollouts_in_flight_and_they_keep_their_version(
    stage: Stage, two_servers: RunningServers, make_vllm: MakeBackend, real_broker: Broker
) -> None:
    doors = two_servers.doors()
    sync = sync_of(doors, real_broker)
    before, after = stage.publish(2), stage.publish(3)
    sync(2, before.weights_path)
    backend = make_vllm(LONG)
    backend.follow(before)
    done: list[Generation] = []
    flight = threading.Thread(target=lambda: done.extend(backend.generate(stage.samples[:8], range(8))))

    flight.start()
    wait_until_busy(doors)
    sync(3, after.weights_path)
    flight.join()

    # each rollout is wholly of one version: those in flight of 2, those that waited at the door of 3
    assert len(done) == 8
    assert {item.policy_version for item in done} <= {2, 3}
    assert 2 in {item.policy_version for item in done}
    assert all(item.version_spans == () for item in done)


@pytest.mark.req("V-2")
@pytest.mark.parametrize("way", ["full", "transfer"])
def test_a_kept_rollout_goes_on_with_the_new_weights_and_carries_its_lowest_version(
    stage: Stage,
    two_servers: RunningServers,
    make_vllm: MakeBackend,
    real_broker: Broker,
    transfer: WeightTransfer,
    way: str,
) -> None:
    doors = two_servers.doors()
    sync = sync_of(doors, real_broker, "keep", transfer if way == "transfer" else load_by_path)
    before, after = stage.publish(2), stage.publish(3)
    sync(2, before.weights_path)
    backend = make_vllm(LONG)
    backend.follow(before)
    done: list[Generation] = []
    flight = threading.Thread(target=lambda: done.extend(backend.generate(stage.samples[:8], range(8))))

    flight.start()
    wait_until_busy(doors)
    sync(3, after.weights_path)
    flight.join()

    mixed = [item for item in done if item.version_spans]
    assert len(done) == 8
    assert mixed, "no rollout was in flight during the sync"
    for item in mixed:
        assert [policy_version for policy_version, _ in item.version_spans] == [2, 3]
        assert item.policy_version == 2
        assert sum(num_tokens for _, num_tokens in item.version_spans) == len(item.response_token_ids)


def wait_until_busy(doors: list[VllmServer]) -> None:
    """Return when every server has begun to generate; its own gauge says so."""
    import httpx

    for door in doors:
        for _ in range(2000):
            text = httpx.get(f"{door.base_url}/metrics", timeout=10).text
            running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
            generated = [
                line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")
            ]
            if sum(float(line.split()[-1]) for line in running) > 0 and generated:
                break
        else:
            pytest.fail(f"{door.base_url} never became busy")


@pytest.mark.req("V-2")
def test_weights_that_a_server_cannot_see_stop_the_run_and_leave_the_server_alive(
    stage: Stage, two_servers: RunningServers, make_vllm: MakeBackend, real_broker: Broker, tmp_path: Path
) -> None:
    doors = two_servers.doors()
    sync = sync_of(doors, real_broker)
    sync(2, stage.publish(2).weights_path)

    with pytest.raises(RunStopped, match=r"no \*\.safetensors"):
        sync(3, str(tmp_path / "elsewhere" / "v3"))

    # nothing generates from unknown weights; the next one to come brings the servers back
    assert all(door.is_healthy() and door.is_paused() for door in doors)
    backend = make_vllm()
    backend.follow(stage.publish(2))
    assert {item.policy_version for item in backend.generate(stage.samples[:4], [0] * 4)} == {2}


@pytest.mark.req("V-1", "V-2", "V-4")
def test_a_killed_server_is_left_out_and_catches_up_before_its_next_request(
    stage: Stage,
    two_servers: RunningServers,
    make_vllm: MakeBackend,
    make_hf: Callable[[], HfBackend],
    real_broker: Broker,
) -> None:
    doors = two_servers.doors()
    sync = sync_of(doors, real_broker)
    sync(2, stage.publish(2).weights_path)
    backend, hf = make_vllm(), make_hf()
    backend.follow(stage.publish(2))
    assert len(backend.generate(stage.samples[:4], [0] * 4)) == 4

    two_servers.processes[1].kill()
    with pytest.raises(ServerUnavailable):
        backend.generate(stage.samples[:4], [0] * 4)
    policy = stage.publish(3)
    sync(3, policy.weights_path)
    backend.follow(policy)
    hf.follow(policy)
    expected = ids_of(hf.generate(stage.samples[:4], [0] * 4))
    assert ids_of(backend.generate(stage.samples[:4], [0] * 4)) == expected

    two_servers.restart(1)
    assert doors[1].label() == "default"
    backend.follow(policy)
    assert doors[1].label() == f"3:{policy.weights_path}"
    alone = make_vllm(doors=[two_servers.doors()[1]])
    alone.follow(policy)
    assert ids_of(alone.generate(stage.samples[:4], [0] * 4)) == expected


@pytest.mark.req("V-2")
def test_a_transfer_whose_learner_dies_leaves_a_server_that_loads_by_path_and_takes_the_next(
    stage: Stage,
    two_servers: RunningServers,
    make_vllm: MakeBackend,
    make_hf: Callable[[], HfBackend],
    real_broker: Broker,
    transfer: WeightTransfer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a learner that dies after its first bucket: the group is gone, nobody ends the update
    door = two_servers.doors()[0]
    sync_of([door], real_broker)(2, stage.publish(2).weights_path)
    send = ServerGroup.send

    def die(group: ServerGroup, row: torch.Tensor) -> None:
        send(group, row)
        group.close()
        raise ServerFailed("the learner died")

    monkeypatch.setattr(ServerGroup, "send", die)
    monkeypatch.setattr(VllmServer, "finish_weight_update", lambda door: None)
    with pytest.raises(RunStopped, match="the learner died"):
        sync_of([door], real_broker, load_weights=transfer)(3, stage.publish(3).weights_path)
    monkeypatch.undo()
    assert door.is_healthy()
    assert door.label().startswith("loading")

    # when a producer comes by, then the next learner
    for policy, load in ((stage.publish(4), None), (stage.publish(3), transfer)):
        if load is not None:
            sync_of([door], real_broker, load_weights=load)(policy.policy_version, policy.weights_path)
        backend, hf = make_vllm(doors=[door]), make_hf()
        backend.follow(policy)
        hf.follow(policy)
        # then
        expected = ids_of(hf.generate(stage.samples[:4], [0] * 4))
        assert ids_of(backend.generate(stage.samples[:4], [0] * 4)) == expected


@pytest.mark.req("V-2")
def test_a_server_left_paused_by_someone_who_died_is_brought_back(
    stage: Stage, two_servers: RunningServers, make_vllm: MakeBackend
) -> None:
    door = two_servers.doors()[0]
    policy = stage.publish(2)
    backend = make_vllm(doors=[door])
    backend.follow(policy)
    door.pause("wait")

    backend.follow(policy)

    assert not door.is_paused()
    assert len(backend.generate(stage.samples[:1], [0])) == 1
