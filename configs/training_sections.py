"""Sections of the learner: `training`, `stage2_ab` and `stage2_async`."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from broker_schemas.method.evaluation_numbers import NUMBERS, PREFIX
from configs.section import Count, CountOrZero, Positive, Ratio, Section, Share, Text, Weight

Beta = Annotated[float, Field(ge=0, lt=1)]
MOST_SUGGESTED = 3


def _check_metric(name: str) -> str:
    plain = name.removeprefix(PREFIX)
    if plain in NUMBERS:
        return plain
    near = difflib.get_close_matches(plain, NUMBERS, n=MOST_SUGGESTED, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}? The others are" if near else "expected one of"
    others = ", ".join(other for other in NUMBERS if other not in near)
    raise ValueError(f"no number of an evaluation; {advice} {others}")


class EarlyStopSection(Section):
    """Stops training at an evaluation; off unless `target` or `patience` is set."""

    metric: Annotated[str, AfterValidator(_check_metric)] = "f1"
    """Evaluation number that is watched, by its name in `rollstream eval`: f1_class_50, map_50, and so on."""
    target: Weight | None = None
    """Stop once the number reaches this, 0 to 1 for a share; null = no target."""
    patience: Count | None = None
    """Stop after this many evaluations without a better number; null = never."""


class LoraSection(Section):
    """Low-rank adapters on a frozen base, coordinate rows trained along; off unless `rank` is set."""

    rank: Count | None = None
    """Rank of every adapter; null = no adapters, the weights themselves are trained."""
    alpha: Positive | None = None
    """An adapter is scaled by alpha / rank; null = 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training."""
    targets: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Ends of the names of the linear layers that get an adapter; each must match at least one."""
    dora: bool = False
    """Train the length of every weight row apart from its direction (DoRA)."""


class LearningRatesSection(Section):
    """Peak learning rates of parts of the model; a part that is not named here takes `learning_rate`."""

    vision: Positive | None = None
    """Of the vision tower without its mergers; null = `learning_rate`."""
    merger: Positive | None = None
    """Of the mergers between vision and text; null = `learning_rate`."""
    text: Positive | None = None
    """Of the text model; null = `learning_rate`."""
    coordinates: Positive | None = None
    """Of the rows of the coordinate tokens in embedding and head; null = as `text`."""


class TrainingSection(Section):
    """Batch contract, packing, optimizer, checkpoints and evaluation."""

    effective_batch_size: Count
    """Raw rollouts (or ground-truth samples) a step, all ranks; a queued step trains what GA packs hold."""
    per_device_train_batch_size: Count = 1
    """Raw rollouts per rank and micro-step."""
    gradient_accumulation_steps: Count | None = None
    """GA; null = effective_batch_size / (per_device_train_batch_size x W), which it must equal if given."""
    global_max_length: Annotated[int, Field(ge=16)]
    """The packing length: most tokens in one packed row, hence in one segment."""
    packing: bool = True
    """Pack segments into rows without padding; must be true."""
    packing_buffer: Count = 512
    """Most segments waiting to be packed."""
    packing_min_fill_ratio: Share = 0.65
    """A pack filled less than this is warned about; 0 = never."""
    packing_drop_last: bool = True
    """Leftover segments at the end are never padded out into a pack; must be true."""
    packing_selector: Literal["exact", "binpacking", "fifo"] = "exact"
    """How a pack is chosen: fullest possible, the binpacking package's proposal, or oldest first."""
    max_steps: Count
    """Optimizer steps of the run."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Beta = 0.9
    """First moment decay of AdamW."""
    adam_beta2: Beta = 0.999
    """Second moment decay of AdamW."""
    adam_epsilon: Positive = 1e-8
    """Denominator constant of AdamW."""
    max_grad_norm: Weight = 1.0
    """Gradients are scaled down to this norm; 0 = no clipping."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up; cosine and linear end at `min_learning_rate`."""
    min_learning_rate: Weight = 0.0
    """Where cosine and linear end; a part with a learning rate of its own ends at the same share of it."""
    learning_rates: LearningRatesSection = Field(default_factory=LearningRatesSection)
    non_finite_loss: Literal["stop", "quarantine"] = "stop"
    """What a rollout with a loss that is no number does: ends the run, or is taken out of its step."""
    precision: Literal["bf16", "float32"] | None = None
    """bf16 = bfloat16 arithmetic, float32 weights, gradient sums and moments; null = bf16 on GPUs only."""
    loss_chunk_positions: CountOrZero = 256
    """Supervised positions whose logits exist at a time; 0 = all of a row at once."""
    activation_checkpointing: bool = False
    """Keep only the inputs of text and vision layers and compute the rest again in the backward pass."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """Copies of the model: one a rank, one spread over all ranks, or one spread over each node's ranks."""
    lora: LoraSection = Field(default_factory=LoraSection)
    freeze: Annotated[tuple[Literal["vision", "merger", "text"], ...], Field(strict=False)] = ()
    """Parts of the model that are not trained."""
    save_every_steps: CountOrZero = 50
    """Optimizer steps between checkpoints; 0 = only at the end."""
    num_checkpoints_kept: Count = 2
    """Latest checkpoints that are kept; the best by the watched evaluation number is kept besides."""
    eval_every_steps: CountOrZero = 0
    """Optimizer steps between evaluations; 0 = none during training."""
    early_stop: EarlyStopSection = Field(default_factory=EarlyStopSection)
    num_threads: CountOrZero = 1
    """CPU threads per learner rank; 0 = as torch chooses."""


class EvaluationSection(Section):
    """Who evaluates while a run trains, and on what; how often is `training.eval_every_steps`."""

    in_stack: bool | None = None
    """By the producers, beside training; null = where a run has producers; off = the learner stops for it."""
    num_samples: Count | None = None
    """Validation images per evaluation, the first ones of the file; null = all."""


class ScheduleSection(Section):
    """Which optimizer steps are rollout steps."""

    b_ratio: Ratio | None = None
    """Share of B steps, an exact decimal in [0, 1]; required for the A/B variants."""


class Stage2AbSection(Section):
    """The A/B schedule, for stage2_ab_training and stage2_async."""

    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    desc_ce_weight: Weight = 1.0
    """Weight of the tokens of `desc` values in the cross-entropy of channel A."""


class Stage2AsyncSection(Section):
    """The queue of stage2_async."""

    queue_limit: Count = 8
    """Most packs waiting per rank; on overflow the oldest is dropped; at least GA."""
    version_window: CountOrZero = 2
    """Policy versions that a pack may lag behind; 0 = only the current one."""
    sync_every_steps: Count = 1
    """Optimizer steps between publications of the weights."""
    prefetch_target_packs: Count = 4
    """Packs per rank that producers aim to keep waiting; at least GA, at most queue_limit."""
    stall_timeout_s: Positive = 300.0
    """Seconds a rank waits for ranks, broker or rollouts before all leave together; read by every variant."""
    in_flight_sync: Literal["strict", "keep"] = "strict"
    """During a weight sync, generations finish first (strict) or freeze and go on (keep)."""
