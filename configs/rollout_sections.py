"""Section `custom`: the trainer variant and everything about rollouts, matching, targets and losses."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from configs.section import Count, Positive, Section, Share, Weight

Variant = Literal["rollout_matching_sft", "stage2_ab_training", "stage2_async"]
TOP_K_OFF = -1


def _check_base_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as exc:
        raise ValueError("expected http://host:port or https://host:port") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("expected http://host:port or https://host:port, without credentials")
    return value.rstrip("/")


def _check_top_k(value: int) -> int:
    if value != TOP_K_OFF and value < 1:
        raise ValueError("expected -1 (off) or at least 1")
    return value


class DecodingSection(Section):
    """Sampling, for both backends."""

    temperature: Weight = 0.0
    """Sampling temperature; 0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with this much probability; 1 = off."""
    top_k: Annotated[int, AfterValidator(_check_top_k)] = TOP_K_OFF
    """Number of likeliest tokens to sample from; -1 = off."""


class VllmServerEntry(Section):
    """One vLLM server."""

    base_url: Annotated[str, AfterValidator(_check_base_url)]
    """Address, `http://host:port`."""


class VllmServerSection(Section):
    """The vLLM servers and how long to wait for them."""

    servers: Annotated[tuple[VllmServerEntry, ...], Field(strict=False)] = ()
    """The servers, in the order of their shares; at least one for the vllm backend."""
    timeout_s: Positive = 240.0
    """Seconds for a server to become healthy and for a weight sync."""
    infer_timeout_s: Positive = 120.0
    """Seconds for one generation request."""


class VllmSyncSection(Section):
    """How weights reach the servers."""

    mode: Literal["full", "transfer"] = "full"
    """`full` = each server loads the published folder by its path; `transfer` = rank 0 sends the weights."""
    fallback_to_full: bool = True
    """Let a server load the folder by its path when a transfer to it fails; only `transfer` reads it."""


class VllmSection(Section):
    """Rollouts by vLLM servers over HTTP."""

    mode: Literal["server"] = "server"
    """`server` = real servers, started apart from the learner."""
    server: VllmServerSection = Field(default_factory=VllmServerSection)
    sync: VllmSyncSection = Field(default_factory=VllmSyncSection)


class RolloutMatchingSection(Section):
    """Rollouts, matching, transport targets and losses (ROLLOUT_MATCHING.md sections 5, 6 and 8)."""

    rollout_backend: Literal["hf", "vllm"] = "hf"
    """Who generates: transformers inside the worker, or vLLM servers."""
    decode_batch_size: Count = 4
    """Most rollouts in one generation call per rollout GPU."""
    max_new_tokens: Count = 1024
    """Most tokens of a rollout; longer ones are cut and counted as truncated."""
    repetition_penalty: Positive = 1.0
    """Penalty for tokens already written; 1 = off."""
    decoding: DecodingSection = Field(default_factory=DecodingSection)
    candidate_top_k: Count = 10
    """Ground-truth shapes kept per prediction before assignment."""
    maskiou_gate: Share = 0.3
    """Smallest IoU of a match, for training and for evaluation; equal passes."""
    maskiou_resolution: Annotated[int, Field(ge=8, le=4096)] = 256
    """Edge of the square mask canvas for polygons, in cells."""
    fp_cost: Weight = 1.0
    """Assignment cost of leaving a prediction unmatched."""
    fn_cost: Weight = 1.0
    """Assignment cost of leaving a ground-truth object unmatched."""
    ot_points: Annotated[int, Field(ge=4, le=4096)] = 64
    """Points on each boundary for optimal transport, its vertices included."""
    ot_cost: Literal["l2_squared", "l2", "l1"] = "l2_squared"
    """Cost between boundary points: squared distance once both boundaries are centred, or plain distance."""
    ot_epsilon: Positive = 20.0
    """Entropic blur in the unit of the cost: squared bins, at most, with l2_squared, else bins."""
    ot_iters: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Most Sinkhorn iterations; with l2_squared they end when no image moves by a bin."""
    target_sigma: Positive = 2.0
    """Width of the Gaussian target over bins, in bins."""
    target_truncate: Annotated[int, Field(ge=0, le=999)] | None = None
    """Bins from the target beyond which the target distribution is zero; null = never."""
    temperature_coord: Positive = 1.0
    """Temperature of the coordinate distribution in the loss."""
    soft_ce_weight: Weight = 1.0
    """Weight of the soft cross-entropy of a coordinate slot."""
    w1_weight: Weight = 1.0
    """Weight of the Wasserstein-1 distance of a coordinate slot."""
    gate_weight: Weight = 1.0
    """Weight of the gate, which moves probability onto coordinate tokens."""
    duplicate_weight: Weight = 0.0
    """Weight of the unlikelihood of coordinate and structure tokens of repeated objects; 0 = not trained."""
    post_rollout_pack_scope: Literal["micro", "window"] = "micro"
    """Packing of rollout_matching_sft: `micro` carries leftovers over, `window` sees the whole step."""
    debug_dump_parse_failures: bool = False
    """Write rollouts that did not parse into the run folder."""
    debug_dump_max: Count = 50
    """Most rollouts written by `debug_dump_parse_failures`."""
    vllm: VllmSection = Field(default_factory=VllmSection)


class ExtraSection(Section):
    """Settings of the method."""

    rollout_matching: RolloutMatchingSection = Field(default_factory=RolloutMatchingSection)


class CustomSection(Section):
    """The trainer variant and its method."""

    trainer_variant: Variant
    """What an optimizer step is: every step a rollout step, A/B on policy, or A/B from the queue."""
    extra: ExtraSection = Field(default_factory=ExtraSection)
