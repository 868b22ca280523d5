"""Plain values of one learner process; the wiring fills them from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from learner.companions import Companions
from learner.losses import LossSettings
from learner.model_parts import AdapterSettings, FrozenPart
from learner.optimization import OptimizationSettings
from learner.sharding import Precision, Sharding


@dataclass(frozen=True, kw_only=True)
class EarlyStopSettings:
    """When the validation number ``metric`` ends a run: at ``target``, or after ``patience`` evaluations
    without a better one. It is a key of ROLLOUT_MATCHING section 10 without its ``eval_rollout_``.
    """

    metric: str
    target: float | None
    patience: int | None


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """What one rank of the loop needs to know.

    ``companions``: the tokenizer and processor files that go with the weights.
    ``b_ratio``: exact decimal, 1 for ``rollout_matching_sft``.
    ``gradient_accumulation_steps``: rows that an A step is cut into on each rank; B steps bring their own
    packs. ``row_capacity_tokens``: the packing length. ``save_every_steps``, ``eval_every_steps``:
    optimizer steps, 0 only at the end and never. ``evaluation_timeout_s``: how long the other ranks wait
    for rank 0's evaluation.
    ``run_id``: who the run is, written into its checkpoints.
    ``publication_dtype``: format of published weights, None as the model computes.
    ``num_rollouts_in_step``: the segments of every B step where its packs are trained as they fill [S-8];
    None where a step is trained when it is claimed.
    ``adapter``: what is trained in place of the model's weights, None for the weights themselves.
    """

    checkpoints_dir: Path
    policy_dir: Path
    companions: Companions
    loss: LossSettings
    optimization: OptimizationSettings
    max_steps: int
    b_ratio: str
    seed: int
    gradient_accumulation_steps: int
    row_capacity_tokens: int = 2048
    sync_every_steps: int
    save_every_steps: int
    eval_every_steps: int
    is_evaluated_by_others: bool = False
    num_checkpoints_kept: int
    num_policies_kept: int = 4
    is_policy_published: bool = True
    stall_timeout_s: float
    evaluation_timeout_s: float = 3600.0
    precision: Precision
    sharding: Sharding
    frozen_parts: tuple[FrozenPart, ...] = ()
    adapter: AdapterSettings | None = None
    publication_dtype: torch.dtype | None = None
    is_checkpointing_activations: bool = False
    num_rollouts_in_step: int | None = None
    early_stop: EarlyStopSettings
    run_id: str = ""
