"""Order of a sync, who may be left out of it, who catches up, and what stops the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fakeredis
import httpx
import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.keys import RunKeys
from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import DeadlinePassed, RunStopped, ServerFailed, ServerRefused, ServerUnavailable
from broker_schemas.rollout_servers.server_lock import server_locks
from broker_schemas.rollout_servers.server_sync import ServerSync
from broker_schemas.rollout_servers.weight_label import WeightLabel
from broker_schemas.rollout_servers.weight_sync import load_into_servers
from producers.vllm_servers import ServerFleet, check_room
from tests.builders.vllm_fakes import FakeVllm

LABEL = WeightLabel(policy_version=3, weights_path="/p/v3")
POLICY = PublishedPolicy(policy_version=3, optimizer_step=3, weights_path="/p/v3", published_at_ms=0)


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


def two() -> list[FakeVllm]:
    return [FakeVllm("http://one:8000"), FakeVllm("http://two:8000")]


def sync_of(servers: list[FakeVllm], clock: Clock | None = None) -> ServerSync:
    clock = clock or Clock()
    doors = [server.door() for server in servers]
    return ServerSync(doors=doors, timeout_s=10.0, clock=clock, pause=clock.pause)


def fleet_of(servers: list[FakeVllm], clock: Clock | None = None) -> ServerFleet:
    clock = clock or Clock()
    doors = [server.door() for server in servers]
    return ServerFleet(doors=doors, startup_timeout_s=10.0, clock=clock, pause=clock.pause)


def failing(server: FakeVllm, path: str, status: int = 500) -> None:
    server.faults.append(
        lambda request: httpx.Response(status, text="boom") if request.url.path == path else None
    )


@pytest.mark.req("V-2")
def test_a_server_is_paused_marked_loaded_cleared_labelled_and_resumed_in_this_order() -> None:
    server = FakeVllm()

    assert load_into_servers([server.door()], LABEL, "wait") == {}

    assert server.log == [
        "/pause?mode=wait",
        "/update_weight_version loading 3:/p/v3",
        "/collective_rpc load_published_weights /p/v3",
        "/reset_prefix_cache?reset_running_requests=true",
        "/reset_encoder_cache",
        "/update_weight_version 3:/p/v3",
        "/resume",
    ]


@pytest.mark.req("V-2")
def test_no_server_goes_on_before_all_have_loaded() -> None:
    servers, order = two(), []
    for server in servers:
        server.faults.append(lambda request: order.append(request.url.path))  # type: ignore[func-returns-value]

    load_into_servers([server.door() for server in servers], LABEL, "keep")

    first_resume = order.index("/resume")
    assert order[:first_resume].count("/reset_encoder_cache") == 2
    assert order[:2] == ["/pause", "/pause"]


@pytest.mark.req("V-2")
@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
def test_a_server_that_fails_stays_paused_under_a_label_that_is_no_version(path: str) -> None:
    broken, sound = two()
    failing(broken, path)

    failures = load_into_servers([broken.door(), sound.door()], LABEL, "wait")

    assert list(failures) == [broken.base_url]
    assert isinstance(failures[broken.base_url], ServerFailed)
    assert broken.is_paused
    assert not broken.label.startswith("3:")
    assert (sound.label, sound.is_paused) == ("3:/p/v3", False)


@pytest.mark.req("V-1", "V-2")
def test_the_first_sync_waits_for_every_server() -> None:
    servers, clock = two(), Clock()
    servers[1].is_up = False
    sync = sync_of(servers, clock)

    with pytest.raises(DeadlinePassed, match="not answering: http://two:8000"):
        sync(0, "/p/v0")

    assert clock.now_s >= 10
    assert servers[0].log == [], "nothing is loaded before all are there"


@pytest.mark.req("V-2")
def test_a_later_sync_goes_on_without_a_server_that_is_down_but_not_without_all() -> None:
    servers = two()
    sync = sync_of(servers)
    sync(0, "/p/v0")

    servers[1].is_up = False
    sync(1, "/p/v1")
    assert (servers[0].label, servers[1].label) == ("1:/p/v1", "0:/p/v0")

    servers[0].is_up = False
    with pytest.raises(DeadlinePassed, match="policy version 2"):
        sync(2, "/p/v2")


@pytest.mark.req("V-2")
def test_a_sync_waits_for_the_only_server_to_come_back() -> None:
    server, clock = FakeVllm(), Clock()
    sync = sync_of([server], clock)
    sync(0, "/p/v0")
    server.is_up = False

    def come_back(seconds: float) -> None:
        clock.pause(seconds)
        server.is_up = clock.now_s >= 4

    sync.pause = come_back
    sync(1, "/p/v1")

    assert server.label == "1:/p/v1"


@pytest.mark.req("V-2")
@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/resume"])
def test_a_server_that_answers_but_cannot_load_stops_the_run_with_the_reason(path: str) -> None:
    servers = two()
    sync = sync_of(servers)
    sync(0, "/p/v0")
    failing(servers[1], path)

    with pytest.raises(RunStopped, match=f"policy version 1: .*{path}.*boom"):
        sync(1, "/p/v1")


@pytest.mark.req("V-2")
def test_a_server_that_goes_down_in_the_middle_of_a_sync_is_left_out() -> None:
    servers = two()
    sync = sync_of(servers)
    sync(0, "/p/v0")

    def crash(request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/collective_rpc":
            servers[1].is_up = False
            raise httpx.ReadError("connection reset", request=request)
        return None

    servers[1].faults.append(crash)
    sync(1, "/p/v1")

    assert servers[0].label == "1:/p/v1"
    assert servers[1].label == "loading 1:/p/v1"


@pytest.mark.req("V-2")
def test_the_locks_of_all_servers_are_held_during_a_sync_and_let_go_after_a_failure() -> None:
    servers, held = two(), []

    @contextmanager
    def hold(base_url: str) -> Iterator[None]:
        held.append(base_url)
        yield
        held.remove(base_url)

    sync = sync_of(servers[::-1])
    sync.hold = hold
    seen: list[list[str]] = []
    servers[0].faults.append(lambda request: seen.append(list(held)))  # type: ignore[func-returns-value]

    sync(0, "/p/v0")

    assert ["http://one:8000", "http://two:8000"] in seen
    assert held == []


@pytest.mark.req("V-2")
def test_a_lock_that_stays_taken_stops_the_run() -> None:
    @contextmanager
    def hold(base_url: str) -> Iterator[None]:
        raise ServerUnavailable(f"{base_url}: another process has been changing its weights")
        yield

    sync = sync_of(two())
    sync.hold = hold

    with pytest.raises(DeadlinePassed, match="changing its weights"):
        sync(0, "/p/v0")


@pytest.mark.req("V-1", "V-2")
def test_a_restarted_server_catches_up_before_it_is_used() -> None:
    fresh, current = two()
    current.label = "3:/p/v3"

    live = fleet_of([fresh, current]).follow(POLICY)

    assert [server.door.base_url for server in live] == [fresh.base_url, current.base_url]
    assert fresh.label == "3:/p/v3"
    assert current.log == [], "a server with the weights is left alone"


@pytest.mark.req("V-2")
@pytest.mark.parametrize("label", ["2:/p/v2", "9:/other/v9", "loading 3:/p/v3", "default"])
def test_weights_that_are_old_or_of_another_run_are_replaced(label: str) -> None:
    server = FakeVllm(label=label)

    fleet_of([server]).follow(POLICY)

    assert server.label == "3:/p/v3"


def test_a_server_ahead_of_the_policy_is_used_as_it_is() -> None:
    server = FakeVllm(label="4:/p/v4")

    live = fleet_of([server]).follow(POLICY)

    assert live[0].weights.policy_version == 4
    assert server.log == []


@pytest.mark.req("V-2")
def test_a_server_left_paused_is_loaded_again_and_resumed() -> None:
    server = FakeVllm(label="3:/p/v3")
    server.is_paused = True

    fleet_of([server]).follow(POLICY)

    assert server.log[0] == "/pause?mode=wait"
    assert not server.is_paused


@pytest.mark.req("V-2")
def test_a_server_that_the_learner_syncs_meanwhile_is_not_loaded_twice() -> None:
    server = FakeVllm(label="2:/p/v2")
    server.is_paused = True

    @contextmanager
    def hold(base_url: str) -> Iterator[None]:
        server.label, server.is_paused = "3:/p/v3", False
        yield

    fleet = fleet_of([server])
    fleet.hold = hold
    fleet.follow(POLICY)

    assert server.log == []


@pytest.mark.req("V-1")
def test_a_server_that_is_down_is_left_out() -> None:
    servers = two()
    servers[0].is_up = False

    live = fleet_of(servers).follow(POLICY)

    assert [server.door.base_url for server in live] == ["http://two:8000"]


@pytest.mark.req("Q-11")
def test_waiting_for_a_first_server_ends_with_what_to_do() -> None:
    servers, clock = two(), Clock()
    for server in servers:
        server.is_up = False

    with pytest.raises(ServerUnavailable, match=r"within 10 s .*rollstream serve vllm"):
        fleet_of(servers, clock).follow(POLICY)
    assert 10 <= clock.now_s < 12


def test_a_server_that_cannot_catch_up_says_why_at_once() -> None:
    server, clock = FakeVllm(), Clock()
    server.load_problem = "no *.safetensors in /p/v3 as this server sees it"

    with pytest.raises(ServerRefused, match="safetensors"):
        fleet_of([server], clock).follow(POLICY)
    assert clock.now_s == 0


def test_a_server_without_the_token_endpoint_speaks_chat() -> None:
    server = FakeVllm(label="3:/p/v3")
    server.takes_token_ids = False

    assert fleet_of([server]).follow(POLICY)[0].dialect == "chat"


def test_a_server_too_small_for_the_rollouts_is_refused() -> None:
    live = fleet_of([FakeVllm(label="3:/p/v3")]).follow(POLICY)

    check_room(live, 512)
    with pytest.raises(ServerRefused, match="max_model_len is 512, .* up to 513"):
        check_room(live, 513)


@pytest.mark.req("V-2")
def test_the_lock_of_a_server_excludes_others_and_is_free_afterwards() -> None:
    redis = fakeredis.FakeRedis()
    mine = server_locks(Broker(redis, RunKeys("run")), wait_s=0.01)
    theirs = server_locks(Broker(redis, RunKeys("run")), wait_s=0.01)

    with (
        mine("http://one:8000"),
        theirs("http://two:8000"),
        pytest.raises(ServerUnavailable, match="another process has been changing its weights"),
        theirs("http://one:8000"),
    ):
        pytest.fail("two holders")
    with theirs("http://one:8000"):
        pass


def test_a_lock_that_ran_out_is_let_go_without_a_fuss() -> None:
    redis = fakeredis.FakeRedis()
    hold = server_locks(Broker(redis, RunKeys("run")), wait_s=0.01)

    with hold("http://one:8000"):
        redis.flushall()

    assert redis.keys() == []
