"""L-7: servers take adapters at run time, by a name with the policy version; the base stays loaded."""

from __future__ import annotations

import pytest

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import ServerRefused
from broker_schemas.rollout_servers.weight_label import WeightLabel
from broker_schemas.rollout_servers.weight_sync import load_into_servers
from producers.vllm_servers import ServerFleet
from tests.builders.vllm_fakes import FakeVllm


def policy_of(number: int) -> PublishedPolicy:
    path = f"/runs/one/policy/v{number}"
    return PublishedPolicy(policy_version=number, optimizer_step=number, weights_path=path, published_at_ms=0)


@pytest.mark.req("L-7")
def test_an_adapter_and_its_rows_are_loaded_while_the_server_is_paused_and_the_base_is_not() -> None:
    server = FakeVllm()
    label = WeightLabel(policy_version=4, weights_path="/runs/one/policy/v4")
    assert load_into_servers([server.door(takes_adapters=True)], label, "wait") == {}
    assert server.log == [
        "/pause?mode=wait",
        "/update_weight_version loading 4:/runs/one/policy/v4",
        "/v1/load_lora_adapter policy-v4",
        "/collective_rpc load_coordinate_rows /runs/one/policy/v4",
        "/reset_prefix_cache?reset_running_requests=true",
        "/reset_encoder_cache",
        "/update_weight_version 4:/runs/one/policy/v4",
        "/resume",
    ]


@pytest.mark.req("L-7")
def test_rollouts_are_asked_of_the_version_by_name_and_older_ones_than_the_last_are_unloaded() -> None:
    server = FakeVllm()
    fleet = ServerFleet(doors=[server.door(takes_adapters=True)], startup_timeout_s=1.0)
    for number in (1, 2, 3):
        (live,) = fleet.follow(policy_of(number))
        assert (live.model, live.adapter_version) == (f"policy-v{number}", number)
        assert live.max_model_len == 512
    assert server.adapters == ["policy-v2", "policy-v3"]


@pytest.mark.req("L-7")
def test_rows_that_a_server_cannot_see_leave_it_paused_with_the_reason() -> None:
    server = FakeVllm()
    server.load_problem = "no adapter in /runs/one/policy/v1 as this server sees it"
    fleet = ServerFleet(doors=[server.door(takes_adapters=True)], startup_timeout_s=1.0)
    with pytest.raises(ServerRefused, match="no adapter in /runs/one/policy/v1 as this server sees it"):
        fleet.follow(policy_of(1))
    assert server.is_paused
    assert server.label.startswith("loading")
