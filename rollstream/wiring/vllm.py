"""Wires what talks to vLLM servers: the rollout backend of producers, the weight sync of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.rollout_servers.server_lock import server_locks
from broker_schemas.rollout_servers.vllm_http import PauseMode, VllmServer
from broker_schemas.rollout_servers.weight_sync import load_by_path
from configs import RunConfig
from learner.server_sync import ServerSync
from producers.rollout_backend import DecodingSettings
from producers.vllm_backend import VllmBackend, VllmBackendSettings
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from rollstream.wiring import access

if TYPE_CHECKING:
    import torch

PAUSE_MODES: Final[dict[str, PauseMode]] = {"strict": "wait", "keep": "keep"}


def server_doors(config: RunConfig) -> list[VllmServer]:
    """Return a door to each server of the configuration, in its order."""
    method = config.rollout_matching
    # a batch is decode_batch_size a GPU; a server of eight GPUs still finds room
    most = max(64, 8 * method.decode_batch_size)
    return [
        VllmServer(server.base_url, timeout_s=method.vllm.server.timeout_s, max_connections=most)
        for server in method.vllm.server.servers
    ]


def pause_mode(config: RunConfig) -> PauseMode:
    """Return what a sync does with rollouts in flight; the on-policy variants have none that may go on."""
    if config.variant != "stage2_async":
        return "wait"
    return PAUSE_MODES[config.stage2_async.in_flight_sync]


def vllm_backend(config: RunConfig, broker: Broker, decoding: DecodingSettings) -> VllmBackend:
    """Return the rollout backend of one producer."""
    server = config.rollout_matching.vllm.server
    folder = access.model_dir(config)
    fleet = ServerFleet(
        doors=server_doors(config),
        startup_timeout_s=server.timeout_s,
        mode=pause_mode(config),
        hold=server_locks(broker, wait_s=server.timeout_s),
    )
    return VllmBackend(
        access.prompt_builder(config, folder),
        access.image_processor(config, folder, config.data.train_jsonl),
        fleet,
        VllmBackendSettings(
            decoding=decoding,
            decode_batch_size=config.rollout_matching.decode_batch_size,
            retry=RetrySettings(request_timeout_s=server.infer_timeout_s),
        ),
    )


def server_sync(config: RunConfig, device: torch.device) -> ServerSync | None:
    """Return the sync of rank 0, which computes on ``device``; None where producers load the weights
    themselves. Raises BrokerError.
    """
    if config.rollout_matching.rollout_backend != "vllm" or config.b_ratio == 0:
        return None
    broker = access.open_broker(config)
    timeout_s = config.rollout_matching.vllm.server.timeout_s
    return ServerSync(
        doors=server_doors(config),
        timeout_s=timeout_s,
        mode=pause_mode(config),
        load_weights=_weight_loader(config, device),
        hold=server_locks(broker, wait_s=timeout_s),
    )


def _weight_loader(config: RunConfig, device: torch.device) -> Callable[[VllmServer, str], None]:
    sync = config.rollout_matching.vllm.sync
    if sync.mode == "full":
        return load_by_path
    # producers import this module and have no torch
    from learner.weight_transfer import WeightTransfer

    timeout_s = config.rollout_matching.vllm.server.timeout_s
    return WeightTransfer(device=device, timeout_s=timeout_s, fallback=sync.fallback_to_full)
