"""What a vLLM server of a run is started with: program, flags, environment, GPUs. Starts nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import rollstream
from broker_schemas.errors import ConfigError, DataError
from broker_schemas.method.processor_file import stored_bounds
from broker_schemas.rollout_servers.vllm_http import LOADER_CLASS, TRANSFER_ENGINE
from configs import RunConfig
from rollstream.wiring import access
from rollstream.wiring.adapters import adapted_layers

EXTENSION_DIR: Final = Path(rollstream.__file__).resolve().parent / "assets" / "vllm"
SERVED_NAME: Final = "policy"
LOCAL_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
ROUND_UP_TOKENS: Final = 64
# what vLLM makes room for
ADAPTER_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """``index`` picks one server, None takes all; ``host`` None listens where ``base_url`` says.

    ``gpus`` None means the configuration's; ``num_images`` is the most images of a prompt.
    """

    index: int | None = None
    host: str | None = None
    gpus: tuple[int, ...] | None = None
    num_images: int = 1
    extra_flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """One server to start: ``flags`` follow ``vllm serve``, ``environment`` is added to ours."""

    index: int
    base_url: str
    gpus: tuple[int, ...]
    flags: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server must know of its model: the folder, bounds of images, prompts and rollouts, and whether
    the learner sends it weights, or adapters of ``adapter_rank`` (0: none), on vision too or not.
    """

    folder: Path
    dtype: str
    most_pixels: int
    max_model_len: int
    num_images: int = 1
    takes_transfers: bool = False
    adapter_rank: int = 0
    has_vision_adapters: bool = False


def plan_servers(config: RunConfig, model: Path, options: ServeOptions) -> list[ServerPlan]:
    """Return the servers to start on this machine.

    ``model`` is the folder that they start with. GPUs are dealt out in order, the same number to each.
    Raises ConfigError for no server, a number without server, or GPUs that cannot be dealt out.
    """
    urls = [server.base_url for server in config.rollout_matching.vllm.server.servers]
    if not urls:
        raise ConfigError(
            "custom.extra.rollout_matching.vllm.server.servers: got none, expected at least one base_url"
        )
    if options.index is not None and not 0 <= options.index < len(urls):
        raise ConfigError(f"--index: got {options.index}, expected 0 to {len(urls) - 1}")
    chosen = list(range(len(urls))) if options.index is None else [options.index]
    served = ServedModel(
        folder=model,
        dtype=config.rollout_dtype,
        most_pixels=config.model.image.max_pixels or checkpoint_pixels(model),
        max_model_len=longest_rollout(config, model, options.num_images),
        num_images=options.num_images,
        takes_transfers=config.rollout_matching.vllm.sync.mode == "transfer",
        adapter_rank=config.training.lora.rank or 0,
        has_vision_adapters=any("visual" in name for name in adapted_layers(config, model)),
    )
    plans = []
    for index, gpus in zip(chosen, _deal_gpus(config, options, chosen, len(urls)), strict=True):
        parts = urlsplit(urls[index])
        host = options.host or _listen_host(parts.hostname, urls[index])
        port = parts.port or (443 if parts.scheme == "https" else 80)
        plans.append(
            ServerPlan(
                index=index,
                base_url=urls[index],
                gpus=gpus,
                flags=(*serve_flags(served, host, port, len(gpus)), *options.extra_flags),
                environment=_environment(gpus, len(chosen)),
            )
        )
    return plans


def plan_alone(served: ServedModel, port: int) -> ServerPlan:
    """Return one CPU server at ``port`` of this machine, without a run around it."""
    return ServerPlan(
        index=0,
        base_url=f"http://127.0.0.1:{port}",
        gpus=(),
        flags=serve_flags(served, "127.0.0.1", port, num_gpus=0),
        environment=_environment((), 1),
    )


def _listen_host(host: str | None, base_url: str) -> str:
    if host in LOCAL_HOSTS:
        return str(host)
    raise ConfigError(
        f"{base_url}: not this machine's own address; give --host (0.0.0.0 for all interfaces, only in a "
        "network that you trust: these servers take orders from anyone) and --index"
    )


def _deal_gpus(
    config: RunConfig, options: ServeOptions, chosen: Sequence[int], num_servers: int
) -> list[tuple[int, ...]]:
    if options.gpus is not None:
        gpus, places, num_hands = options.gpus, list(range(len(chosen))), len(chosen)
    else:
        gpus, places, num_hands = tuple(config.devices.rollout_gpus), list(chosen), num_servers
    taken = sorted(set(gpus) & set(config.devices.learner_gpus))
    if taken:
        raise ConfigError(f"rollout GPUs: got {taken} of devices.learner_gpus, expected disjoint sets")
    if len(gpus) % num_hands:
        raise ConfigError(f"rollout GPUs: got {len(gpus)} for {num_hands} servers, expected a multiple")
    share = len(gpus) // num_hands
    return [tuple(gpus[place * share : (place + 1) * share]) for place in places]


def serve_flags(served: ServedModel, host: str, port: int, num_gpus: int) -> tuple[str, ...]:
    """Return what follows ``vllm serve``."""
    # images come at the size that the model sees: bounds wide enough that the server never resizes again
    bounds = {"size": {"shortest_edge": 1, "longest_edge": 2 * served.most_pixels}}
    return (
        str(served.folder),
        *("--host", host, "--port", str(port)),
        *("--served-model-name", SERVED_NAME),
        *("--dtype", served.dtype),
        *("--max-model-len", str(served.max_model_len)),
        *("--limit-mm-per-prompt", json.dumps({"image": served.num_images, "video": 0})),
        *("--mm-processor-kwargs", json.dumps(bounds)),
        # images repeat once an epoch, and a cache cleared by a sync under way would lose what it promised
        *("--mm-processor-cache-gb", "0"),
        # the checkpoint's own sampling defaults must not mix with ours
        *("--generation-config", "vllm"),
        *("--worker-extension-cls", LOADER_CLASS),
        *_transfer_flags(served),
        *_adapter_flags(served),
        # the endpoint that takes token ids and says which weights wrote each token
        "--enable-scale-out",
        *(("--tensor-parallel-size", str(num_gpus)) if num_gpus else ("--enforce-eager",)),
    )


def _transfer_flags(served: ServedModel) -> tuple[str, ...]:
    if not served.takes_transfers:
        return ()
    return ("--weight-transfer-config", json.dumps({"backend": TRANSFER_ENGINE}))


def _adapter_flags(served: ServedModel) -> tuple[str, ...]:
    if not served.adapter_rank:
        return ()
    largest = next((rank for rank in ADAPTER_RANKS if rank >= served.adapter_rank), None)
    if largest is None:
        raise ConfigError(
            f"training.lora.rank: got {served.adapter_rank}, but vLLM serves ranks up to {ADAPTER_RANKS[-1]}"
        )
    # the adapter of a policy version, and the one before it
    flags = ("--enable-lora", "--max-lora-rank", str(largest), "--max-loras", "2")
    return (*flags, "--enable-tower-connector-lora") if served.has_vision_adapters else flags


def _environment(gpus: tuple[int, ...], num_on_machine: int) -> dict[str, str]:
    environment = {
        # pause, resume, weight loading
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # holds the worker extension and nothing else
        "PYTHONPATH": os.pathsep.join(filter(None, (str(EXTENSION_DIR), os.environ.get("PYTHONPATH")))),
    }
    if gpus:
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus)}
    threads = max(1, (os.cpu_count() or 1) // num_on_machine)
    return {
        **environment,
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def checkpoint_pixels(model: Path) -> int:
    """Return the most pixels of a resized image that the checkpoint's processor allows."""
    stored = _read_json(model / "preprocessor_config.json")
    most = stored_bounds(stored).max_pixels
    if not most:
        raise DataError(f"{model / 'preprocessor_config.json'}: no image bounds; set model.image in the run")
    return most


def longest_rollout(config: RunConfig, model: Path, num_images: int) -> int:
    """Return the most tokens of prompt and response together, rounded up a little.

    Where an odd image needs more, producers refuse it by name; ``--flag --max-model-len=N`` raises it.
    """
    prompts = access.prompt_builder(config, model)
    text_tokens = len(prompts.tokenizer.encode(prompts.build_text(num_images), add_special_tokens=False).ids)
    patch = int(_read_json(model / "preprocessor_config.json").get("patch_size", 16))
    most_pixels = config.model.image.max_pixels or checkpoint_pixels(model)
    image_tokens = -(-most_pixels // (patch * prompts.merge_size) ** 2)
    needed = text_tokens + num_images * image_tokens + config.rollout_matching.max_new_tokens
    return -(-needed // ROUND_UP_TOKENS) * ROUND_UP_TOKENS


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not readable as JSON ({exc}); give a whole model folder") from exc
    return content if isinstance(content, dict) else {}
