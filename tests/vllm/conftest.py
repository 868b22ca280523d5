"""Two real vLLM servers on CPU with a tiny Qwen3-VL, started once a session.

Run by `make test-vllm`, which sets ROLLSTREAM_TEST_VLLM; without it these tests are skipped, and with it a
missing vLLM fails.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.rollout_servers.server_slots import unshared_slots
from broker_schemas.rollout_servers.vllm_http import VllmServer
from configs import RunConfig
from producers.hf_backend import HfBackend
from producers.rollout_backend import DecodingSettings
from producers.vllm_backend import VllmBackend
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from rollstream.datasets.scenes import make_scenes
from rollstream.models.tiny_model import make_tiny_model
from rollstream.vllm.plan import ServeOptions, ServerPlan, plan_servers
from rollstream.vllm.serving import VllmProcess, vllm_python
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.settings import decoding_settings, hf_backend_settings, vllm_backend_settings
from tests.vllm.weights import publish_shaken

START_TIMEOUT_S = 300.0
PIXELS = 128 * 128


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/vllm" in item.path.as_posix():
            # servers take a minute or two to start where cores are few
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def python_with_vllm() -> Path:
    if os.environ.get("ROLLSTREAM_TEST_VLLM") != "1":
        pytest.skip("real vLLM servers run in `make test-vllm`")
    python = vllm_python(os.environ)
    if python is None:
        pytest.fail("no vLLM: run scripts/install_vllm.sh")
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stage:
    """A tiny model, scenes of 128 x 128 pixels, and the root of published weights."""

    model: Path
    root: Path
    samples: list[Sample]
    prompts: PromptBuilder
    images: ImageProcessor

    def publish(self, policy_version: int, family: str = "policy") -> PublishedPolicy:
        """Write a version once; servers take versions of another ``family`` for those of another run."""
        path = self.root / family / f"v{policy_version}"
        if not path.exists():
            publish_shaken(self.model, self.root / family, policy_version)
        return PublishedPolicy(
            policy_version=policy_version, optimizer_step=0, weights_path=str(path), published_at_ms=0
        )


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, python_with_vllm: Path) -> Stage:
    root = tmp_path_factory.mktemp("vllm")
    make_tiny_model(root / "model")
    make_scenes(root / "scenes", num_train=12, num_val=2, seed=5)
    return Stage(
        model=root / "model",
        root=root,
        samples=read_dataset(root / "scenes" / "train.jsonl"),
        prompts=PromptBuilder(root / "model"),
        images=ImageProcessor(root / "model", root / "scenes", min_pixels=PIXELS, max_pixels=PIXELS),
    )


@dataclass
class RunningServers:
    """The servers, which a test may kill and start again."""

    plans: list[ServerPlan]
    python: Path
    processes: list[VllmProcess]
    opened: list[VllmServer] = field(default_factory=list)

    def doors(self) -> list[VllmServer]:
        """Return a new door to each server; all are closed after the test."""
        made = [VllmServer(plan.base_url, timeout_s=120.0) for plan in self.plans]
        self.opened.extend(made)
        return made

    def restart(self, index: int) -> None:
        """Start server ``index`` again with the weights that it first had."""
        self.processes[index] = VllmProcess(self.plans[index], self.python)
        self.processes[index].wait_until_healthy(START_TIMEOUT_S)


@pytest.fixture(scope="session")
def two_servers(
    stage: Stage, python_with_vllm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServers]:
    config = vllm_config(stage, tmp_path_factory.mktemp("config"), [free_port(), free_port()])
    plans = plan_servers(config, stage.model, ServeOptions())
    running = RunningServers(plans=plans, python=python_with_vllm, processes=[])
    with ExitStack() as stack:
        stack.callback(lambda: [process.stop() for process in running.processes])
        running.processes.extend(VllmProcess(plan, python_with_vllm) for plan in plans)
        for process in running.processes:
            process.wait_until_healthy(START_TIMEOUT_S)
        yield running


@pytest.fixture(autouse=True)
def closed_doors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close what a test opened: a socket left open fails a later test."""
    yield
    if "two_servers" in request.fixturenames:
        running: RunningServers = request.getfixturevalue("two_servers")
        for door in running.opened:
            door.close()
        running.opened.clear()


def vllm_config(stage: Stage, folder: Path, ports: list[int]) -> RunConfig:
    """A run on the servers at ``ports`` of this machine."""
    mapping = make_mapping(
        data={"train_jsonl": str(stage.root / "scenes" / "train.jsonl")},
        model={
            "name_or_path": str(stage.model),
            "image": {"min_pixels": PIXELS, "max_pixels": PIXELS},
        },
    )
    mapping["custom"]["extra"]["rollout_matching"].update(
        rollout_backend="vllm",
        max_new_tokens=480,
        vllm={
            "server": {"servers": [{"base_url": f"http://127.0.0.1:{port}"} for port in ports]},
            # such a server loads by path as well
            "sync": {"mode": "transfer"},
        },
    )
    return load_mapping(folder, mapping)


MakeBackend = Callable[..., VllmBackend]


@pytest.fixture
def make_vllm(stage: Stage, two_servers: RunningServers) -> Iterator[MakeBackend]:
    """Makes vLLM backends on the two servers, closed afterwards."""
    made: list[VllmBackend] = []

    def make(
        decoding: DecodingSettings | None = None,
        doors: list[VllmServer] | None = None,
        request_timeout_s: float = 60.0,
    ) -> VllmBackend:
        fleet = ServerFleet(doors=doors or two_servers.doors(), startup_timeout_s=60.0)
        settings = vllm_backend_settings(
            decoding=decoding or decoding_settings(max_new_tokens=24),
            retry=RetrySettings(request_timeout_s=request_timeout_s),
        )
        made.append(VllmBackend(stage.prompts, stage.images, fleet, settings, unshared_slots))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def make_hf(stage: Stage) -> Callable[..., HfBackend]:
    """Makes hf backends for the same model."""

    def make(decoding: DecodingSettings | None = None) -> HfBackend:
        settings = hf_backend_settings(decoding=decoding or decoding_settings(max_new_tokens=24))
        return HfBackend(stage.prompts, stage.images, settings)

    return make
