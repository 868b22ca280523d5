"""Wires the packer of each trainer variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker_schemas.broker.lease import holding
from broker_schemas.broker.packer_door import PackerDoor
from configs import RunConfig
from consumers.metrics import PackerMetrics
from consumers.pack_buffer import PackBufferSettings
from consumers.packing import require_method
from consumers.step_packer import Planner, StepPacker, StepPackerSettings
from consumers.step_plans import PackList, StepPlan, filled_packs, plan_micro, plan_step_budget, plan_window
from consumers.streaming_packer import StreamingPacker, StreamingPackerSettings
from rollstream.wiring import access


def step_planner(config: RunConfig) -> Planner:
    """Return how one on-policy step is cut into packs: by variant and pack scope."""
    training, num_ranks = config.training, config.learner_world_size
    capacity, num_micro_steps = training.global_max_length, config.gradient_accumulation_steps

    def step_budget(_: Sequence[int], lengths: Sequence[int]) -> StepPlan:
        return plan_step_budget(lengths, capacity, num_ranks=num_ranks)

    def window(_: Sequence[int], lengths: Sequence[int]) -> StepPlan:
        return plan_window(lengths, capacity, num_micro_steps=num_micro_steps, num_ranks=num_ranks)

    def micro(carried: Sequence[int], lengths: Sequence[int]) -> StepPlan:
        return plan_micro(
            carried,
            lengths,
            capacity,
            num_micro_steps=num_micro_steps,
            num_ranks=num_ranks,
            packing_buffer=training.packing_buffer,
            method=training.packing_selector,
        )

    if config.variant == "stage2_ab_training":
        return step_budget
    return window if config.rollout_matching.post_rollout_pack_scope == "window" else micro


def early_packs(config: RunConfig) -> Callable[[Sequence[int]], PackList] | None:
    """Return what finds the packs that are trained while the rest of their step is generated [S-8].

    Only where the step's number of segments is known before they are: the micro scope carries some over, and
    the window scope looks at all of them.
    """
    training = config.training
    if config.variant != "stage2_ab_training":
        return None
    return lambda lengths: filled_packs(lengths, training.global_max_length, training.packing_selector)


def build_packer(config: RunConfig, door: PackerDoor, metrics: PackerMetrics) -> StreamingPacker | StepPacker:
    """Return the packer of the run's variant; raises BinpackingMissing where the selector needs it."""
    training = config.training
    require_method(training.packing_selector)
    if config.variant != "stage2_async":
        return StepPacker(
            door,
            step_planner(config),
            metrics,
            StepPackerSettings(
                world_size=config.learner_world_size,
                capacity=training.global_max_length,
                min_fill_ratio=training.packing_min_fill_ratio,
            ),
            filled=early_packs(config),
        )
    return StreamingPacker(
        door,
        metrics,
        StreamingPackerSettings(
            buffer=PackBufferSettings(
                capacity_tokens=training.global_max_length,
                packing_buffer=training.packing_buffer,
                min_fill_ratio=training.packing_min_fill_ratio,
                method=training.packing_selector,
            ),
            world_size=config.learner_world_size,
            packs_per_rank=config.gradient_accumulation_steps,
            queue_limit=config.stage2_async.queue_limit,
            version_window=config.stage2_async.version_window,
        ),
    )


def run_packer(config: RunConfig, index: int) -> None:
    """Run until a signal."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    metrics = PackerMetrics(access.start_endpoint(config, "pack", index).registry)
    with holding(broker, "packer", on_loss=stop.set) as (held, _):
        access.say_ready(config, "pack", index, selector=config.training.packing_selector)
        build_packer(config, PackerDoor(held), metrics).loop(stop)
    broker.close()
