"""Wires one learner rank; without torchrun around it, starts torchrun around itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.lease import Lease, holding
from broker_schemas.errors import BrokerError, ConfigError
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.model_folder import empty_policy, load_policy
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.identity import max_steps_course
from configs import RunConfig
from learner.attention import choose_attention, use_attention
from learner.augmentation import AugmentationSettings
from learner.channel_a import ChannelASettings, ChannelASource
from learner.collation import CollationSettings
from learner.determinism import fix_arithmetic
from learner.distributed import Ranks, connect
from learner.ground_truth_only import GroundTruthOnlyBroker
from learner.losses import LossSettings
from learner.metrics import LearnerMetrics
from learner.model_parts import Part
from learner.optimization import OptimizationSettings
from learner.packed_forward import position_rule_of
from learner.patient_broker import PatientBroker
from learner.pixel_source import ProcessorPixelSource
from learner.ports import Evaluate, LearnerBroker, ReadEvaluations
from learner.settings import EarlyStopSettings, LearnerSettings
from learner.stall_limits import StallLimits
from learner.step_report import LogRow
from learner.step_rows import RowSources
from learner.stop_request import StopRequest
from learner.train_loop import LearnerOutcome, LearnerParts, run_learner
from learner.training_log import TrainingLog
from rollstream.run_lock import StackLock
from rollstream.wiring import access
from rollstream.wiring.adapters import adapter_settings
from rollstream.wiring.identity import read_identity
from rollstream.wiring.room import check_room
from rollstream.wiring.trainable import read_samples
from rollstream.wiring.vllm import rollout_chunk, server_sync

LOG = logging.getLogger("rollstream.learner")
# of the deadline: two tries (connecting, answering) fit between the end of a rank's patience and the deadline


def loss_settings(config: RunConfig, prompts: PromptBuilder) -> LossSettings:
    """Return the loss of the run for a model's coordinate vocabulary."""
    method = config.rollout_matching
    return LossSettings(
        coord_ids=tuple(int(token_id) for token_id in prompts.coord_vocab.ids),
        target_sigma=method.target_sigma,
        target_truncate=method.target_truncate,
        temperature_coord=method.temperature_coord,
        soft_ce_weight=method.soft_ce_weight,
        w1_weight=method.w1_weight,
        gate_weight=method.gate_weight,
        duplicate_weight=method.duplicate_weight,
        desc_ce_weight=config.stage2_ab.desc_ce_weight,
        chunk_positions=config.training.loss_chunk_positions,
        keeps_non_finite=config.training.non_finite_loss == "quarantine",
    )


def optimization_settings(config: RunConfig) -> OptimizationSettings:
    """Return optimizer and learning-rate course."""
    training = config.training
    own = training.learning_rates
    rates: tuple[tuple[Part, float | None], ...] = (
        *(("vision", own.vision), ("merger", own.merger)),
        *(("text", own.text), ("coordinates", own.coordinates or own.text)),
    )
    return OptimizationSettings(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
        warmup_steps=training.warmup_steps,
        schedule=training.lr_scheduler,
        max_steps=training.max_steps,
        max_steps_course=max_steps_course_of(config),
        max_grad_norm=training.max_grad_norm,
        part_rates={part: rate for part, rate in rates if rate is not None},
        smallest_fraction=training.min_learning_rate / training.learning_rate,
    )


def max_steps_course_of(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """Return the lengths that the run was given on its way, each from its first optimizer step on."""
    identity = read_identity(access.run_folder(config))
    return () if identity is None else max_steps_course(identity)


def run_id_of(config: RunConfig) -> str:
    """Return who the run is, "" before its folder says so."""
    identity = read_identity(access.run_folder(config))
    return "" if identity is None else identity.run_id


def learner_settings(config: RunConfig, prompts: PromptBuilder) -> LearnerSettings:
    """Return the plain values of the loop."""
    training, stop = config.training, config.training.early_stop
    return LearnerSettings(
        checkpoints_dir=access.run_folder(config).checkpoints_dir,
        policy_dir=access.run_folder(config).policy_dir,
        companions=access.companions(config),
        loss=loss_settings(config, prompts),
        optimization=optimization_settings(config),
        max_steps=training.max_steps,
        b_ratio=exact_ratio(config),
        seed=config.run.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        row_capacity_tokens=training.global_max_length,
        sync_every_steps=sync_every_steps(config),
        num_policies_kept=config.stage2_async.version_window + 2,
        save_every_steps=training.save_every_steps,
        eval_every_steps=training.eval_every_steps if config.data.val_jsonl else 0,
        is_evaluated_by_others=config.evaluates_in_stack,
        is_policy_published=config.b_ratio > 0,
        stall_timeout_s=config.stage2_async.stall_timeout_s,
        num_checkpoints_kept=training.num_checkpoints_kept,
        precision=config.precision,
        sharding=training.sharding,
        frozen_parts=training.freeze,
        adapter=adapter_settings(config, prompts),
        publication_dtype=getattr(torch, config.rollout_dtype),
        is_checkpointing_activations=training.activation_checkpointing,
        num_rollouts_in_step=training.effective_batch_size
        if config.variant == "stage2_ab_training"
        else None,
        run_id=run_id_of(config),
        early_stop=EarlyStopSettings(metric=stop.metric, target=stop.target, patience=stop.patience),
    )


def exact_ratio(config: RunConfig) -> str:
    """Return the share of B steps as an exact decimal text."""
    if config.variant == "rollout_matching_sft":
        return "1"
    return str(config.stage2_ab.schedule.b_ratio)


def sync_every_steps(config: RunConfig) -> int:
    """Return how often weights are published; the on-policy variants publish after every step."""
    return config.stage2_async.sync_every_steps if config.variant == "stage2_async" else 1


def claim_settings(config: RunConfig) -> ClaimSettings:
    """Return how the variant claims its steps."""
    shared: dict[str, Any] = {
        "world_size": config.learner_world_size,
        "packs_per_rank": config.gradient_accumulation_steps,
        "archived_only": config.archive.enabled,
    }
    if config.variant == "stage2_async":
        window = config.stage2_async.version_window
        return ClaimSettings(**shared, version_window=window, mode="fallback")
    return ClaimSettings(
        **shared, version_window=0, mode="sealed", num_rollouts=config.training.effective_batch_size
    )


def collation_settings(
    config: RunConfig, prompts: PromptBuilder, images: ImageProcessor
) -> CollationSettings:
    """Return what model and loss fix about a row."""
    return CollationSettings(
        image_token_id=prompts.image_token_id,
        merge_size=prompts.merge_size,
        processor_fingerprint=images.fingerprint,
        coord_ids=frozenset(int(token_id) for token_id in prompts.coord_vocab.ids),
        with_repeats=config.rollout_matching.duplicate_weight > 0,
    )


def has_ground_truth_steps(config: RunConfig) -> bool:
    """Return whether a step can be A: by the schedule, or where a short queue makes it one."""
    return config.b_ratio < 1 or config.variant == "stage2_async"


def channel_a_source(config: RunConfig, prompts: PromptBuilder, images: ImageProcessor) -> ChannelASource:
    """Return the ground-truth segments of A steps."""
    augment = config.data.augment
    return ChannelASource(
        read_samples(config, config.data.train_jsonl),
        prompts,
        images,
        ChannelASettings(
            seed=config.run.seed,
            effective_batch_size=config.training.effective_batch_size,
            ordering=config.data.object_ordering,
            augmentation=AugmentationSettings(
                jitter_pixels=augment.jitter_px,
                crop_probability=0.5 if augment.crop else 0.0,
                shrink_probability=0.5 if augment.scale else 0.0,
                flip_probability=0.5 if augment.flip else 0.0,
            ),
        ),
    )


def rank_device(config: RunConfig, local_rank: int) -> torch.device:
    """Return the device of one rank: its learner GPU of this node, or the CPU; raises ConfigError."""
    gpus = config.devices.learner_gpus
    if gpus and local_rank >= len(gpus):
        raise ConfigError(
            f"devices.learner_gpus: got {len(gpus)} GPUs of this node for local rank {local_rank}, "
            f"expected one each; start torchrun with --nproc_per_node {len(gpus)} on every node"
        )
    return torch.device(f"cuda:{gpus[local_rank]}") if gpus else torch.device("cpu")


def run_learner_rank(
    config: RunConfig,
    *,
    evaluate: Evaluate | None,
    stop: StopRequest,
    on_step: Callable[[LogRow], None] | None = None,
) -> LearnerOutcome:
    """Run this rank, under torchrun or alone, until the run is done or ``stop`` is asked for by a signal.

    Raises RunStopped, ConfigError.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = rank_device(config, local_rank)
    fix_arithmetic(config.training.num_threads, is_cpu=device.type == "cpu")
    if rank == 0:
        check_room(config, access.model_dir(config), device)
        rollout_chunk(config, wait_s=0.0)
    stop.follow_signals()
    with learner_door(config, rank) as (door, confirm):
        return _run_rank(config, door, confirm, stop, (rank, device), (evaluate, on_step))


def _run_rank(
    config: RunConfig,
    door: LearnerBroker,
    confirm: Callable[[], None],
    stop: StopRequest,
    place: tuple[int, torch.device],
    listeners: tuple[Evaluate | None, Callable[[LogRow], None] | None],
) -> LearnerOutcome:
    rank, device = place
    broker = PatientBroker(
        door,
        stall_timeout_s=config.stage2_async.stall_timeout_s,
        clock=time.monotonic,
        pause=time.sleep,
        is_stopping=lambda: stop.is_set,
    )
    ranks = connect(
        rank=rank,
        world_size=config.learner_world_size,
        stall_timeout_s=config.stage2_async.stall_timeout_s,
        device=device,
        is_stopping=lambda: stop.is_set,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "0")),
    )
    try:
        parts, settings = build_parts(config, ranks, broker, stop, *listeners)
        parts = replace(parts, confirm=confirm, read_evaluations=_evaluations_of(door))
        try:
            return run_learner(parts, settings)
        finally:
            for log in (parts.log, parts.evaluation_log):
                if log is not None:
                    log.close()
    finally:
        ranks.close()
        broker.close()


@contextmanager
def learner_door(config: RunConfig, rank: int) -> Iterator[tuple[LearnerBroker, Callable[[], None]]]:
    """Yield the door to the queue, and what raises PlaceTaken once another learner took this one's place.

    A run of A steps alone, without a broker, needs no queue: rank 0 locks its folder instead.
    Raises ConfigError where another learner runs, naming it.
    """
    if not access.needs_broker(config):
        lock = StackLock.acquire(access.run_folder(config).path, of_learner=True) if rank == 0 else None
        try:
            yield GroundTruthOnlyBroker(), lambda: None
        finally:
            if lock is not None:
                lock.release()
        return
    images = access.image_processor(config, access.model_dir(config), config.data.train_jsonl)
    settings = replace(claim_settings(config), processor_fingerprint=images.fingerprint)
    broker = impatient_broker(config)
    if rank != 0:
        yield LearnerDoor(broker, settings), lambda: None
        return
    # the fence in every script ends a learner that lost its place; a stop request would have it write first
    with holding(broker, "learner", on_loss=lambda: None) as (held, lease):
        yield LearnerDoor(held, settings), lambda: _confirm(lease)


def _evaluations_of(door: LearnerBroker) -> ReadEvaluations | None:
    """Return what reads the numbers that an evaluator left; a broker that is away has none yet."""
    if not isinstance(door, LearnerDoor):
        return None

    def read(beyond_step: int) -> list[tuple[int, dict[str, float]]]:
        try:
            found = door.evaluations(beyond_step=beyond_step)
        except BrokerError:
            return []
        return [(numbers.optimizer_step, numbers.metrics) for numbers in found]

    return read


def _confirm(lease: Lease) -> None:
    with suppress(BrokerError):  # away: it cannot have given the place to another
        lease.keep()


def impatient_broker(config: RunConfig) -> Broker:
    """Return a connection whose every try is short: who waits for the broker counts against one deadline.

    At the start it is waited for as usual; raises BrokerError.
    """
    address, run = access.broker_address(config), config.run.name
    try_s = StallLimits(total_s=config.stage2_async.stall_timeout_s).one_call_s
    Broker.connect(run, address, socket_timeout_s=try_s).close()
    quick = replace(address, retries=0)
    return Broker(open_redis(quick, socket_timeout_s=try_s), RunKeys(run), quick)


def build_parts(
    config: RunConfig,
    ranks: Ranks,
    broker: LearnerBroker,
    stop: StopRequest,
    evaluate: Evaluate | None,
    on_step: Callable[[LogRow], None] | None,
) -> tuple[LearnerParts, LearnerSettings]:
    """Return everything that the loop of one rank joins."""
    folder, endpoint = access.model_dir(config), access.start_endpoint(config, "learn", ranks.rank)
    prompts = access.prompt_builder(config, folder)
    images = access.image_processor(config, folder, config.data.train_jsonl)
    compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    choice = choose_attention(config.model.attention, ranks.device, compute_dtype)
    LOG.info("attention of packed rows: %s (%s)", choice.kernel, choice.why)
    # one rank reads the weights, the others receive them
    model = load_policy(folder, "float32") if ranks.is_first else empty_policy(folder)
    use_attention(model, choice)
    settings = learner_settings(config, prompts)
    run, first = access.run_folder(config), ranks.is_first
    parts = LearnerParts(
        model=model,
        ranks=ranks,
        sources=RowSources(
            broker=broker,
            ground_truth=channel_a_source(config, prompts, images)
            if has_ground_truth_steps(config)
            else None,
            pixels=ProcessorPixelSource(images),
            collation=collation_settings(config, prompts, images),
            positions_of=position_rule_of(model),
        ),
        metrics=LearnerMetrics(endpoint.registry),
        stop=stop,
        log=TrainingLog(run.train_log) if first else None,
        evaluation_log=TrainingLog(run.evaluation_log) if first and not config.evaluates_in_stack else None,
        evaluate=evaluate if first else None,
        sync_servers=server_sync(config, ranks.device) if first else None,
        on_step=on_step or (lambda row: None),
    )
    endpoint.reached("model")
    access.say_ready(config, "learn", ranks.rank, model=folder, checkpoint=run.latest_checkpoint() or "none")
    return parts, settings
