"""Wires what talks to vLLM servers: the rollout backend of producers, the weight sync of rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from broker_schemas.broker.broker import Broker
from broker_schemas.errors import ConfigError, RolloutServerError
from broker_schemas.rollout_servers.server_lock import server_locks
from broker_schemas.rollout_servers.server_slots import server_slots
from broker_schemas.rollout_servers.server_sync import ServerSync
from broker_schemas.rollout_servers.vllm_http import PauseMode, VllmServer
from broker_schemas.rollout_servers.weight_sync import load_by_path
from configs import RunConfig
from producers.chunking import InfeasibleChunk, chunk_per_rank
from producers.rollout_backend import DecodingSettings
from producers.vllm_backend import VllmBackend, VllmBackendSettings
from producers.vllm_client import RetrySettings
from producers.vllm_servers import ServerFleet
from rollstream.wiring import access

if TYPE_CHECKING:
    import torch

LOG: Final = logging.getLogger("rollstream.wiring")
LOOK_EVERY_S: Final = 1.0
PAUSE_MODES: Final[dict[str, PauseMode]] = {"strict": "wait", "keep": "keep"}


def server_doors(config: RunConfig) -> list[VllmServer]:
    """Return a door to each server of the configuration, in its order."""
    method = config.rollout_matching
    # a batch is decode_batch_size a GPU; a server of eight GPUs still finds room
    most = max(64, 8 * method.decode_batch_size)
    return [
        VllmServer(
            server.base_url,
            timeout_s=method.vllm.server.timeout_s,
            max_connections=most,
            takes_adapters=config.training.lora.rank is not None,
        )
        for server in method.vllm.server.servers
    ]


def pause_mode(config: RunConfig) -> PauseMode:
    """Return what a sync does with rollouts in flight; the on-policy variants have none that may go on."""
    if config.variant != "stage2_async":
        return "wait"
    return PAUSE_MODES[config.stage2_async.in_flight_sync]


def rollout_chunk(config: RunConfig, *, wait_s: float) -> int | None:
    """Return the most rollouts of one request: what the servers that answer give one learner rank [S-4].

    Waits up to ``wait_s`` for one that answers; None where none does, or where no server is wanted. Raises
    ConfigError where they cannot give every rank one, and where `producers.request_size` is above the chunk.
    """
    if config.rollout_matching.rollout_backend != "vllm" or config.b_ratio == 0:
        return None
    doors = server_doors(config)
    try:
        sizes = _sizes_that_answer(doors, wait_s)
    finally:
        for door in doors:
            door.close()
    if not sizes:
        return None
    decode, num_ranks = config.rollout_matching.decode_batch_size, config.learner_world_size
    try:
        chunk = chunk_per_rank(decode, sizes, num_ranks)
    except InfeasibleChunk as exc:
        raise ConfigError(str(exc)) from exc
    wanted = config.producers.request_size
    if wanted is not None and wanted > chunk:
        raise ConfigError(
            f"producers.request_size: got {wanted}, expected at most the chunk of {chunk} (decode_batch_size "
            f"{decode} on servers with world sizes {sizes}, {num_ranks} learner ranks); leave it unset"
        )
    LOG.info(
        "rollout chunk: %d (decode_batch_size %d, world sizes %s, W %d)", chunk, decode, sizes, num_ranks
    )
    return chunk


def _sizes_that_answer(doors: Sequence[VllmServer], wait_s: float) -> list[int]:
    give_up_at = time.monotonic() + wait_s
    while True:
        sizes = []
        for door in doors:
            try:
                sizes.append(door.world_size())
            except RolloutServerError:
                continue
        if sizes or time.monotonic() >= give_up_at:
            return sizes
        time.sleep(LOOK_EVERY_S)


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
        server_slots(broker, wait_s=server.infer_timeout_s),
        evaluation_images=access.evaluation_images(config, folder),
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
    from broker_schemas.rollout_servers.weight_transfer import WeightTransfer

    timeout_s = config.rollout_matching.vllm.server.timeout_s
    return WeightTransfer(device=device, timeout_s=timeout_s, fallback=sync.fallback_to_full)
