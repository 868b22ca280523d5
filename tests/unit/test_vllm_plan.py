"""What servers are started with: flags, places, GPUs, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import ConfigError, DataError
from broker_schemas.rollout_servers.vllm_http import LOADER_CLASS, TRANSFER_ENGINE
from configs import RunConfig
from rollstream.models.tiny_model import make_tiny_model
from rollstream.vllm.plan import (
    EXTENSION_DIR,
    ServedModel,
    ServeOptions,
    ServerPlan,
    checkpoint_pixels,
    plan_alone,
    plan_servers,
)
from rollstream.vllm.serving import vllm_python
from tests.builders.configs import load_mapping, make_mapping


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "model"
    make_tiny_model(folder)
    return folder


def config_of(folder: Path, *urls: str, **settings: Any) -> RunConfig:
    return load_mapping(folder, config_mapping(*urls, **settings))


def config_mapping(*urls: str, **settings: Any) -> dict[str, Any]:
    mapping = make_mapping(**settings)
    servers = [{"base_url": url} for url in urls]
    mapping["custom"]["extra"]["rollout_matching"].update(
        rollout_backend="vllm", vllm={"server": {"servers": servers}}
    )
    return mapping


def flag(plan: ServerPlan, name: str) -> str:
    return plan.flags[plan.flags.index(name) + 1]


@pytest.mark.req("V-1")
def test_each_server_of_the_configuration_is_started_at_its_place(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, "http://127.0.0.1:8000", "http://localhost:8001")

    one, two = plan_servers(config, model, ServeOptions())

    assert one.flags[0] == str(model)
    assert [(flag(plan, "--host"), flag(plan, "--port")) for plan in (one, two)] == [
        ("127.0.0.1", "8000"),
        ("localhost", "8001"),
    ]
    assert (one.index, two.index) == (0, 1)


@pytest.mark.req("V-1", "V-2")
def test_a_cpu_server_gets_what_rollouts_and_syncs_need(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, "http://127.0.0.1:8000")

    plan = plan_servers(config, model, ServeOptions(extra_flags=("--seed=3",)))[0]

    assert "--enable-scale-out" in plan.flags
    assert "--enforce-eager" in plan.flags
    assert plan.flags[-1] == "--seed=3"
    assert flag(plan, "--generation-config") == "vllm"
    assert flag(plan, "--mm-processor-cache-gb") == "0"
    assert flag(plan, "--worker-extension-cls") == LOADER_CLASS
    assert json.loads(flag(plan, "--limit-mm-per-prompt")) == {"image": 1, "video": 0}
    assert plan.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert plan.environment["PYTHONPATH"].startswith(str(EXTENSION_DIR))


def test_the_worker_extension_is_where_servers_look_for_it() -> None:
    module, _, name = LOADER_CLASS.rpartition(".")

    assert f"class {name}:" in (EXTENSION_DIR / f"{module}.py").read_text()
    assert sorted(path.name for path in EXTENSION_DIR.glob("*.py")) == [
        "rollstream_vllm_transfer.py",
        f"{module}.py",
    ]


@pytest.mark.req("V-5")
def test_the_server_never_resizes_what_our_processor_has_sized(tmp_path: Path, model: Path) -> None:
    image = {"min_pixels": 4096, "max_pixels": 65536}
    config = config_of(tmp_path, "http://127.0.0.1:8000", model={"name_or_path": str(model), "image": image})

    plan = plan_servers(config, model, ServeOptions())[0]

    bounds = json.loads(flag(plan, "--mm-processor-kwargs"))["size"]
    assert bounds["shortest_edge"] <= 4096
    assert bounds["longest_edge"] >= 65536
    # 64 image tokens, about 35 of text, 96 new ones
    assert 195 <= int(flag(plan, "--max-model-len")) <= 260


@pytest.mark.req("V-7")
def test_gpus_are_dealt_out_to_the_servers_in_order(tmp_path: Path, model: Path) -> None:
    config = config_of(
        tmp_path,
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
        devices={"learner_world_size": 2, "rollout_gpus": [0, 1, 4, 5], "learner_gpus": [2, 3]},
    )

    both = plan_servers(config, model, ServeOptions())
    second = plan_servers(config, model, ServeOptions(index=1))

    assert [plan.gpus for plan in both] == [(0, 1), (4, 5)]
    assert both[1].environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert flag(both[0], "--tensor-parallel-size") == "2"
    assert "--enforce-eager" not in both[0].flags
    assert [plan.gpus for plan in second] == [(4, 5)]


@pytest.mark.req("V-7")
@pytest.mark.parametrize("gpus, message", [((2,), "learner_gpus"), ((0, 1, 4), "expected a multiple")])
def test_gpus_that_cannot_be_dealt_out_are_refused(
    tmp_path: Path, model: Path, gpus: tuple[int, ...], message: str
) -> None:
    config = config_of(
        tmp_path,
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
        devices={"learner_world_size": 2, "learner_gpus": [2, 3]},
    )

    with pytest.raises(ConfigError, match=message):
        plan_servers(config, model, ServeOptions(gpus=gpus))


def test_a_server_of_another_machine_needs_a_place_to_listen(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, "http://gpu-box:8000")

    with pytest.raises(ConfigError, match="--host"):
        plan_servers(config, model, ServeOptions())
    plan = plan_servers(config, model, ServeOptions(host="0.0.0.0"))[0]
    assert (flag(plan, "--host"), plan.base_url) == ("0.0.0.0", "http://gpu-box:8000")


@pytest.mark.parametrize("index", [-1, 1])
def test_a_server_that_is_not_in_the_configuration_is_refused(
    tmp_path: Path, model: Path, index: int
) -> None:
    config = config_of(tmp_path, "http://127.0.0.1:8000")

    with pytest.raises(ConfigError, match="expected 0 to 0"):
        plan_servers(config, model, ServeOptions(index=index))


def test_a_run_without_servers_has_nothing_to_start(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one base_url"):
        plan_servers(load_mapping(tmp_path, make_mapping()), model, ServeOptions())


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preprocessor_config"):
        checkpoint_pixels(tmp_path)


def test_a_server_alone_listens_on_this_machine_only(model: Path) -> None:
    served = ServedModel(folder=model, dtype="float32", most_pixels=1 << 14, max_model_len=512)

    plan = plan_alone(served, 8123)

    assert (plan.base_url, flag(plan, "--host")) == ("http://127.0.0.1:8123", "127.0.0.1")


def test_the_interpreter_of_the_environment_variable_comes_first() -> None:
    assert vllm_python({"ROLLSTREAM_VLLM_PYTHON": "/opt/vllm/bin/python"}) == Path("/opt/vllm/bin/python")


@pytest.mark.req("V-2")
def test_servers_take_transfers_only_where_the_learner_sends_them(tmp_path: Path, model: Path) -> None:
    mapping = make_mapping()
    servers = [{"base_url": "http://127.0.0.1:8000"}]
    sync = {"mode": "transfer", "fallback_to_full": False}
    mapping["custom"]["extra"]["rollout_matching"].update(
        rollout_backend="vllm", vllm={"server": {"servers": servers}, "sync": sync}
    )

    (sent,) = plan_servers(load_mapping(tmp_path, mapping), model, ServeOptions())
    (by_path,) = plan_servers(config_of(tmp_path, "http://127.0.0.1:8000"), model, ServeOptions())

    assert json.loads(flag(sent, "--weight-transfer-config")) == {"backend": TRANSFER_ENGINE}
    assert "--weight-transfer-config" not in by_path.flags
    assert (EXTENSION_DIR / "rollstream_vllm_worker.py").read_text("utf-8").count(f'"{TRANSFER_ENGINE}"') == 1


@pytest.mark.req("L-7", "V-1")
def test_a_server_of_adapters_has_room_for_two_and_for_those_on_vision(tmp_path: Path, model: Path) -> None:
    def planned(**lora: Any) -> tuple[str, ...]:
        mapping = config_mapping("http://127.0.0.1:8000")
        mapping["training"]["lora"] = lora
        config = load_mapping(tmp_path, mapping)
        (plan,) = plan_servers(config, model, ServeOptions())
        assert plan.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
        return plan.flags

    flags = planned(rank=12)
    assert flags[flags.index("--enable-lora") :][:5] == (
        *("--enable-lora", "--max-lora-rank", "16"),
        *("--max-loras", "2"),
    )
    assert "--enable-tower-connector-lora" not in flags
    assert "--enable-tower-connector-lora" in planned(rank=8, targets=["q_proj", "qkv"])
    with pytest.raises(ConfigError, match="got 600, but vLLM serves ranks up to 512"):
        planned(rank=600)
    with pytest.raises(ConfigError, match="got w_pack, which match no linear layer"):
        planned(rank=8, targets=["w_pack"])
