"""`rollstream bench rollout`: tokens a second of `hf` and `vllm`, and the time of a sync by model size.

Starts a real vLLM server of its own for every model size; on a machine without GPU, on its CPU.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from rich.table import Table

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import ConfigError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.rollout_servers.server_slots import unshared_slots
from broker_schemas.rollout_servers.server_sync import ServerSync
from broker_schemas.rollout_servers.vllm_http import VllmServer
from broker_schemas.rollout_servers.weight_sync import load_by_path
from broker_schemas.rollout_servers.weight_transfer import WeightTransfer
from producers.rollout_backend import DecodingSettings, RolloutBackend
from producers.vllm_backend import VllmBackend, VllmBackendSettings
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from rollstream.datasets.scenes import make_scenes
from rollstream.models.tiny_model import PRESETS, TinySizes, make_tiny_model
from rollstream.vllm.plan import ServedModel, ServerPlan, checkpoint_pixels, plan_alone
from rollstream.vllm.serving import VllmProcess, vllm_python

NUM_PROMPTS: Final = 32
NUM_SYNCS: Final = 5
MAX_MODEL_LEN: Final = 512
START_TIMEOUT_S: Final = 600.0
REQUEST_TIMEOUT_S: Final = 300.0
SIZES: Final[dict[str, TinySizes]] = {
    "tiny": PRESETS["scenes"],
    "small": TinySizes(
        text_hidden=512, text_intermediate=1536, text_layers=8, text_heads=8, text_key_value_heads=8
    ),
    "medium": TinySizes(
        text_hidden=1024, text_intermediate=3072, text_layers=12, text_heads=16, text_key_value_heads=16
    ),
}


@dataclass(frozen=True, kw_only=True)
class SyncTime:
    """One model size: parameters, bytes of its weights, seconds of one strict sync (the median of five).

    ``full_s`` where the server reads the folder by its path, ``transfer_s`` where the learner sends it.
    """

    name: str
    num_parameters: int
    num_bytes: int
    full_s: float
    transfer_s: float


@dataclass(frozen=True, kw_only=True)
class RolloutBench:
    """``tokens_per_s`` by backend and batch size, on the same prompts with the same weights."""

    num_prompts: int
    max_new_tokens: int
    tokens_per_s: dict[str, dict[int, float]]
    syncs: tuple[SyncTime, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> Table:
        """Return one table: generation first, then syncs."""
        table = Table(title=f"rollouts: {self.num_prompts} prompts, {self.max_new_tokens} new tokens each")
        for heading in ("what", "at", "measured"):
            table.add_column(heading)
        for backend, by_batch in self.tokens_per_s.items():
            for batch_size, rate in by_batch.items():
                table.add_row(f"generate, {backend}", f"batches of {batch_size}", f"{rate:,.0f} tokens/s")
        for sync in self.syncs:
            size = f"{sync.num_parameters / 1e6:.1f} M parameters, {sync.num_bytes / 1e6:.0f} MB"
            table.add_row(f"sync by path, {sync.name}", size, f"{sync.full_s * 1000:,.0f} ms")
            table.add_row(f"sync by transfer, {sync.name}", size, f"{sync.transfer_s * 1000:,.0f} ms")
        return table


def run_rollout_bench(*, seed: int, quick: bool) -> RolloutBench:
    """Measure; ``quick`` takes the tiny model and one batch size. Raises ConfigError without vLLM."""
    python = vllm_python(os.environ)
    if python is None:
        raise ConfigError(
            "bench rollout: no vLLM, expected an environment with it; run scripts/install_vllm.sh"
        )
    decoding = DecodingSettings(
        max_new_tokens=32 if quick else 96, temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0
    )
    names = ["tiny"] if quick else list(SIZES)
    rates: dict[str, dict[int, float]] = {}
    syncs = []
    with tempfile.TemporaryDirectory(prefix="rollstream-bench-") as folder:
        root = Path(folder)
        make_scenes(root / "scenes", num_train=NUM_PROMPTS, num_val=1, seed=seed)
        samples = read_dataset(root / "scenes" / "train.jsonl")
        for name in names:
            made = make_tiny_model(root / name, seed=seed, sizes=SIZES[name])
            plan = plan_alone(_served(made.folder), _free_port())
            with VllmProcess(plan, python) as server:
                server.wait_until_healthy(START_TIMEOUT_S)
                syncs.append(_time_sync(name, made.folder, made.num_parameters, plan, root))
                if name == "tiny":
                    batch_sizes = (8,) if quick else (1, 8, 32)
                    rates = _time_backends(made.folder, plan, samples, decoding, batch_sizes)
    return RolloutBench(
        num_prompts=NUM_PROMPTS,
        max_new_tokens=decoding.max_new_tokens,
        tokens_per_s=rates,
        syncs=tuple(syncs),
    )


def _served(model: Path) -> ServedModel:
    return ServedModel(
        folder=model,
        dtype="float32",
        most_pixels=checkpoint_pixels(model),
        max_model_len=MAX_MODEL_LEN,
        takes_transfers=True,
    )


def _time_sync(name: str, model: Path, num_parameters: int, plan: ServerPlan, root: Path) -> SyncTime:
    policy = root / f"policy-{name}" / "v1"
    shutil.copytree(model, policy)
    transfer = WeightTransfer(device=torch.device("cpu"), timeout_s=START_TIMEOUT_S, fallback=False)
    full_s, transfer_s = (_median_sync_s(load, policy, plan) for load in (load_by_path, transfer))
    transfer.close()
    return SyncTime(
        name=name,
        num_parameters=num_parameters,
        num_bytes=sum(file.stat().st_size for file in policy.glob("*.safetensors")),
        full_s=full_s,
        transfer_s=transfer_s,
    )


def _median_sync_s(load_weights: Callable[[VllmServer, str], None], policy: Path, plan: ServerPlan) -> float:
    door = VllmServer(plan.base_url, timeout_s=START_TIMEOUT_S)
    sync = ServerSync(doors=[door], timeout_s=START_TIMEOUT_S, load_weights=load_weights)
    times = []
    # the first one opens connections
    for _ in range(1 + NUM_SYNCS):
        started = time.perf_counter()
        sync(1, str(policy))
        times.append(time.perf_counter() - started)
    sync.close()
    return median(times[1:])


def _time_backends(
    model: Path,
    plan: ServerPlan,
    samples: Sequence[Sample],
    decoding: DecodingSettings,
    batch_sizes: Sequence[int],
) -> dict[str, dict[int, float]]:
    from producers.hf_backend import HfBackend, HfBackendSettings

    prompts = PromptBuilder(model)
    images = ImageProcessor(model, samples[0].image_files[0].parent.parent)
    published = PublishedPolicy(
        policy_version=1, optimizer_step=0, weights_path=str(model), published_at_ms=0
    )
    rates: dict[str, dict[int, float]] = {"hf": {}, "vllm": {}}
    for batch_size in batch_sizes:
        hf = HfBackend(
            prompts,
            images,
            HfBackendSettings(decoding=decoding, decode_batch_size=batch_size, dtype="float32"),
        )
        rates["hf"][batch_size] = _rate(hf, published, samples)
        vllm = VllmBackend(
            prompts,
            images,
            ServerFleet(doors=[VllmServer(plan.base_url, timeout_s=60.0)], startup_timeout_s=60.0),
            VllmBackendSettings(
                decoding=decoding,
                decode_batch_size=batch_size,
                retry=RetrySettings(request_timeout_s=REQUEST_TIMEOUT_S),
            ),
            unshared_slots,
        )
        rates["vllm"][batch_size] = _rate(vllm, published, samples)
        vllm.close()
    return rates


def _rate(backend: RolloutBackend, published: PublishedPolicy, samples: Sequence[Sample]) -> float:
    backend.follow(published)
    # compiles kernels and fills caches
    backend.generate(samples[:2], [0, 1])
    started = time.perf_counter()
    generations = backend.generate(samples, range(len(samples)))
    elapsed_s = time.perf_counter() - started
    return sum(len(item.response_token_ids) for item in generations) / elapsed_s


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
