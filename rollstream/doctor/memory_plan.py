"""Gigabytes of a learner rank, its host, its syncs and checkpoints, from sizes alone. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GB: Final = 1e9
FLOAT32_BYTES: Final = 4
BF16_BYTES: Final = 2
ROOM: Final = 0.92  # of a GPU's memory: the rest goes to the driver, kernels' workspaces and fragments


@dataclass(frozen=True, kw_only=True)
class MemorySizes:
    """What the plan is made of, in weights and bytes.

    ``trained`` weights have gradients and moments, ``frozen`` ones have not; ``published`` are what a policy
    version holds; ``is_frozen_kept``: a checkpoint has the frozen ones too. ``row_bytes`` is what one packed
    row keeps until its loss, ``passing_bytes`` the most that comes on top of it. ``num_sharing`` ranks share
    one copy; then ``outside_layers`` weights are gathered for a whole row and those of ``largest_layer`` for
    one layer at a time. ``num_ranks_here`` ranks run on one host.
    """

    trained: int
    frozen: int
    published: int
    row_bytes: int
    passing_bytes: int
    precision: str
    num_sharing: int
    num_ranks_here: int
    cache_bytes: int
    publication_bytes_per_weight: int = BF16_BYTES
    is_frozen_kept: bool = True
    outside_layers: int = 0
    largest_layer: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank, of its host, and of what it writes."""

    weights: int
    gradients: int
    moments: int
    row: int
    passing: int
    gathered: int
    host: int
    sync: int
    checkpoint: int

    @property
    def fixed(self) -> int:
        """What is there whatever the row."""
        return self.weights + self.gradients + self.moments + self.gathered

    @property
    def rank(self) -> int:
        return self.fixed + self.row + self.passing

    def fits(self, device_bytes: int) -> bool:
        """Return whether a device of this many bytes holds a rank."""
        return self.rank <= ROOM * device_bytes


def plan_memory(sizes: MemorySizes) -> MemoryPlan:
    """Return what the sizes come to.

    bf16 without sharding: a trained weight is kept in float32 for the optimizer and in bfloat16 for the
    arithmetic, a frozen one in bfloat16 alone. A sharded weight that is trained is float32 and cast layer by
    layer. Gradient sums and both moments are float32.
    """
    frozen_bytes = BF16_BYTES if sizes.precision == "bf16" else FLOAT32_BYTES
    has_two_copies = sizes.precision == "bf16" and sizes.num_sharing == 1
    computing = BF16_BYTES if has_two_copies else FLOAT32_BYTES
    exact_copy = FLOAT32_BYTES if has_two_copies else 0
    weights = sizes.trained * (computing + exact_copy) + sizes.frozen * frozen_bytes
    moments = 2 * FLOAT32_BYTES * sizes.trained
    kept = sizes.frozen if sizes.is_frozen_kept else 0
    checkpoint = FLOAT32_BYTES * sizes.trained + moments + frozen_bytes * kept
    # one rank reads the model; every rank's shard passes through the host when a checkpoint is written
    host = (sizes.trained + sizes.frozen) * FLOAT32_BYTES + checkpoint
    return MemoryPlan(
        weights=weights // sizes.num_sharing,
        gradients=FLOAT32_BYTES * sizes.trained // sizes.num_sharing,
        moments=moments // sizes.num_sharing,
        row=sizes.row_bytes,
        passing=sizes.passing_bytes,
        gathered=_gathered(sizes),
        host=host + sizes.num_ranks_here * sizes.cache_bytes,
        sync=sizes.published * sizes.publication_bytes_per_weight,
        checkpoint=checkpoint,
    )


def _gathered(sizes: MemorySizes) -> int:
    """Return what is put together from all ranks: FSDP2 fetches the next layer while one computes."""
    if sizes.num_sharing == 1:
        return 0
    computing = BF16_BYTES if sizes.precision == "bf16" else FLOAT32_BYTES
    layers = 2 * sizes.largest_layer * computing
    # a trained layer's gradient, and its copy in float32 on its way to the ranks that keep it
    on_the_way = sizes.largest_layer * (computing + FLOAT32_BYTES) if sizes.trained > sizes.frozen else 0
    return sizes.outside_layers * computing + layers + on_the_way


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What may still be changed: each is False where it is done already or makes no sense."""

    can_checkpoint_activations: bool
    can_shard: bool
    can_use_lora: bool
    row_tokens: int


def advice(plan: MemoryPlan, device_bytes: int, remedy: Remedy) -> list[str]:
    """Return what to change, the cheapest first, where the plan does not fit; empty where it fits."""
    if plan.fits(device_bytes):
        return []
    said = []
    if remedy.can_checkpoint_activations:
        said.append("training.activation_checkpointing: true keeps a fraction of the row's activations")
    if plan.row > 0 and plan.fixed < ROOM * device_bytes:
        room = ROOM * device_bytes - plan.fixed - plan.passing
        tokens = int(remedy.row_tokens * max(room, 0) / plan.row) // 64 * 64
        if tokens >= 512:
            said.append(f"training.global_max_length: {tokens} fits beside the weights")
    if remedy.can_shard:
        said.append("training.sharding: full spreads weights, gradients and moments over the ranks")
    if remedy.can_use_lora:
        said.append("training.lora.rank: 16 leaves the weights without gradients and moments")
    return said or ["a smaller model, more ranks, or GPUs with more memory"]
