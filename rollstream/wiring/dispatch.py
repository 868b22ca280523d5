"""Wires the dispatcher."""

from __future__ import annotations

from typing import Final

from broker_schemas.broker.lease import holding
from broker_schemas.broker.rollout_requests import LeaseSettings
from broker_schemas.method.dataset import Sample
from configs import RunConfig
from producers.broken_jobs import BrokenJobs
from producers.demand import DemandSettings
from producers.dispatcher import Dispatcher, DispatcherSettings
from producers.evaluation_demand import EvaluationSettings
from producers.jobs import rollout_queue
from producers.metrics import DispatcherMetrics
from rollstream.wiring import access
from rollstream.wiring.identity import check_data
from rollstream.wiring.trainable import read_samples

DEFAULT_REQUEST_SIZE: Final = 4


def lease_settings(config: RunConfig) -> LeaseSettings:
    """Return the lease of a rollout request."""
    return LeaseSettings(
        lease_ms=int(config.producers.lease_s * 1000), max_attempts=config.producers.max_attempts
    )


def request_size(config: RunConfig) -> int:
    """Return how many rollouts a request holds: as configured, or the servers' chunk; raises ConfigError."""
    chunk = None
    if config.rollout_matching.rollout_backend == "vllm":
        from rollstream.wiring.vllm import rollout_chunk

        chunk = rollout_chunk(config, wait_s=config.rollout_matching.vllm.server.timeout_s)
    return config.producers.request_size or chunk or DEFAULT_REQUEST_SIZE


def demand_settings(config: RunConfig, rollouts_per_request: int) -> DemandSettings | None:
    """Return the demand settings of `stage2_async`; None where a step asks for its own rollouts."""
    if config.variant != "stage2_async":
        return None
    return DemandSettings(
        world_size=config.learner_world_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        prefetch_target_packs=config.stage2_async.prefetch_target_packs,
        version_window=config.stage2_async.version_window,
        sync_every_steps=config.stage2_async.sync_every_steps,
        b_ratio=config.b_ratio,
        rollouts_per_request=rollouts_per_request,
    )


def evaluation_samples(config: RunConfig) -> list[Sample]:
    """Return the validation images of a round of evaluation, the first ones; empty where there is no set."""
    if config.data.val_jsonl is None:
        return []
    return read_samples(config, config.data.val_jsonl)[: config.evaluation.num_samples]


def evaluation_settings(config: RunConfig, chunk_size: int) -> EvaluationSettings | None:
    """Return when the dispatcher asks for the validation set; None where it never does."""
    if not config.evaluates_in_stack:
        return None
    is_async = config.variant == "stage2_async"
    return EvaluationSettings(
        num_samples=len(evaluation_samples(config)),
        chunk_size=chunk_size,
        eval_every_steps=config.training.eval_every_steps,
        sync_every_steps=config.stage2_async.sync_every_steps if is_async else 1,
        max_steps=config.training.max_steps,
    )


def run_dispatcher(config: RunConfig, index: int) -> None:
    """Run until a signal; a run without B steps has nothing to dispatch and waits."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    check_data(config, broker)
    metrics = DispatcherMetrics(access.start_endpoint(config, "dispatch", index).registry)
    if config.b_ratio == 0:
        stop.wait()
        return
    size = request_size(config)
    with holding(broker, "dispatcher", on_loss=stop.set) as (held, _):
        dispatcher = Dispatcher(
            held,
            rollout_queue(access.open_jobs(config, broker), broker.keys.rollout_queue, BrokenJobs(metrics)),
            metrics,
            DispatcherSettings(
                world_size=config.learner_world_size,
                num_samples=len(read_samples(config, config.data.train_jsonl)),
                seed=config.run.seed,
                request_size=size,
                demand=demand_settings(config, size),
                evaluation=evaluation_settings(config, size),
                capacity_tokens=config.training.global_max_length,
                start_segments_per_pack=float(config.training.per_device_train_batch_size),
                lease=lease_settings(config),
                job_timeout_s=config.producers.job_timeout_s,
            ),
        )
        access.say_ready(config, "dispatch", index, request_size=size)
        dispatcher.loop(stop)
    broker.close()
