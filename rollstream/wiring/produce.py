"""Wires a producer: an RQ worker with a rollout backend."""

from __future__ import annotations

import os
import socket
from typing import Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.policy import read_policy
from broker_schemas.client import SegmentSink, SinkSettings
from configs import RunConfig
from producers.broken_jobs import BrokenJobs
from producers.jobs import RolloutWorker
from producers.metrics import ProducerMetrics
from producers.producer import Producer, ProducerSettings
from producers.rollout_backend import DecodingSettings, RolloutBackend
from rollstream.wiring import access
from rollstream.wiring.dispatch import evaluation_samples, lease_settings
from rollstream.wiring.identity import check_data, warn_of_model
from rollstream.wiring.trainable import read_samples

HUNG_STATUS: Final = 1


def decoding_settings(config: RunConfig) -> DecodingSettings:
    """Return how rollouts are sampled."""
    method = config.rollout_matching
    return DecodingSettings(
        max_new_tokens=method.max_new_tokens,
        temperature=method.decoding.temperature,
        top_p=method.decoding.top_p,
        top_k=method.decoding.top_k,
        repetition_penalty=method.repetition_penalty,
    )


def rollout_device(config: RunConfig, index: int) -> str:
    """Return the device of producer ``index``: producers take the rollout GPUs in turn [L-9]."""
    gpus = config.devices.rollout_gpus
    return f"cuda:{gpus[index % len(gpus)]}" if gpus else "cpu"


def rollout_backend(config: RunConfig, broker: Broker, index: int = 0) -> RolloutBackend:
    """Return the backend that the configuration names; raises ConfigError, DataError."""
    if config.rollout_matching.rollout_backend == "vllm":
        from rollstream.wiring.vllm import rollout_chunk, vllm_backend

        rollout_chunk(config, wait_s=0.0)
        return vllm_backend(config, broker, decoding_settings(config))
    import torch

    from producers.hf_backend import HfBackend, HfBackendSettings

    torch.set_num_threads(max(1, config.training.num_threads))
    folder = access.model_dir(config)
    return HfBackend(
        access.prompt_builder(config, folder),
        access.image_processor(config, folder, config.data.train_jsonl),
        HfBackendSettings(
            decoding=decoding_settings(config),
            decode_batch_size=config.rollout_matching.decode_batch_size,
            device=rollout_device(config, index),
            dtype=config.rollout_dtype,
            base=folder,
        ),
        evaluation_images=access.evaluation_images(config, folder),
    )


def sink_settings(config: RunConfig) -> SinkSettings:
    """Return the limits of pushing."""
    return SinkSettings(max_bytes=config.broker.max_bytes, dedup_window=config.broker.dedup_window)


def leave_hung_process() -> None:
    """End this process from a thread: its main thread hangs where no signal reaches it."""
    os._exit(HUNG_STATUS)


def run_producer(config: RunConfig, index: int) -> None:
    """Run jobs until a signal; RQ finishes the job in hand first."""
    endpoint = access.start_endpoint(config, "produce", index)
    broker = access.open_broker(config)
    check_data(config, broker)
    warn_of_model(config, broker)
    metrics = ProducerMetrics(endpoint.registry)
    producer = Producer(
        broker=broker,
        sink=SegmentSink(broker, sink_settings(config)),
        backend=rollout_backend(config, broker, index),
        datasets={
            "train": read_samples(config, config.data.train_jsonl),
            "evaluation": evaluation_samples(config),
        },
        metrics=metrics,
        settings=ProducerSettings(
            name=f"{config.run.name}-producer-{index}-{socket.gethostname()}-{os.getpid()}",
            lease=lease_settings(config),
            job_timeout_s=config.producers.job_timeout_s,
            version_window=config.stage2_async.version_window if config.variant == "stage2_async" else 0,
            deadline_s=config.stage2_async.stall_timeout_s,
        ),
        leave=leave_hung_process,
    )
    jobs = access.open_jobs(config, broker)
    endpoint.reached("model")
    policy = read_policy(broker)
    access.say_ready(
        config,
        "produce",
        index,
        backend=config.rollout_matching.rollout_backend,
        policy=f"v{policy.policy_version}" if policy is not None else "none published yet",
    )
    RolloutWorker.work_for(producer, jobs, broker.keys.rollout_queue, BrokenJobs(metrics))
    broker.close()
