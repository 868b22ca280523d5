"""L-7: a real server takes adapters at run time on the base that it loaded once, rows of coordinates too."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.rollout_servers.server_slots import unshared_slots
from broker_schemas.rollout_servers.vllm_http import VllmServer
from producers.hf_backend import HfBackend
from producers.vllm_backend import VllmBackend
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from rollstream.vllm.plan import ServedModel, plan_alone
from rollstream.vllm.serving import VllmProcess
from tests.builders.settings import decoding_settings, hf_backend_settings, vllm_backend_settings
from tests.builders.trained_adapters import write_trained
from tests.vllm.conftest import PIXELS, START_TIMEOUT_S, Stage, free_port

LAYERS = ("q_proj", "down_proj", "qkv", "linear_fc1")


@pytest.mark.req("L-7", "L-5", "V-1")
def test_adapters_of_two_versions_say_what_transformers_says(
    stage: Stage, python_with_vllm: Path, tmp_path: Path
) -> None:
    served = ServedModel(
        folder=stage.model,
        dtype="float32",
        most_pixels=PIXELS,
        max_model_len=512,
        adapter_rank=2,
        has_vision_adapters=True,
    )
    plan = plan_alone(served, free_port())
    decoding = decoding_settings(max_new_tokens=24)
    hf = HfBackend(stage.prompts, stage.images, hf_backend_settings(decoding=decoding, base=stage.model))
    seen = []
    with VllmProcess(plan, python_with_vllm) as server:
        server.wait_until_healthy(START_TIMEOUT_S)
        door = VllmServer(plan.base_url, timeout_s=120.0, takes_adapters=True)
        fleet = ServerFleet(doors=[door], startup_timeout_s=60.0)
        settings = vllm_backend_settings(decoding=decoding, retry=RetrySettings(request_timeout_s=120.0))
        vllm = VllmBackend(stage.prompts, stage.images, fleet, settings, unshared_slots)
        for number in (1, 2):
            folder = tmp_path / "policy" / f"v{number}"
            write_trained(folder, stage.model, seed=number, ends=LAYERS)
            policy = PublishedPolicy(
                policy_version=number, optimizer_step=number, weights_path=str(folder), published_at_ms=0
            )
            vllm.follow(policy)
            hf.follow(policy)
            got = vllm.generate(stage.samples[:4], [0] * 4)
            expected = hf.generate(stage.samples[:4], [0] * 4)
            assert [item.response_token_ids.tolist() for item in got] == [
                item.response_token_ids.tolist() for item in expected
            ]
            assert {item.policy_version for item in got} == {number}
            seen.append([item.response_token_ids.tolist() for item in got])
        assert door.adapters() == ["policy-v1", "policy-v2"]
        vllm.close()
    assert seen[0] != seen[1], "the versions must differ"
