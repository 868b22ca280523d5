"""Turns generations into the records that a producer pushes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.method.dataset import Sample
from broker_schemas.records.records import ImageReference, SegmentRecord
from producers.rollout_backend import Generation


def build_records(
    request: RolloutRequest,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    *,
    processor_fingerprint: str,
    producer: str,
    generated_at_ms: int,
    generation_ms: int,
) -> list[SegmentRecord]:
    """Return a record for each sample of the request, in order; ids depend on the request alone."""
    rows = zip(request.record_ids, request.samples, samples, generations, strict=True)
    return [
        SegmentRecord(
            record_id=record_id,
            policy_version=generation.policy_version,
            sample_id=sample.sample_id,
            task=sample.task,
            images=tuple(
                ImageReference(path=path, width=sample.width, height=sample.height, grid_thw=grid)
                for path, grid in zip(sample.image_paths, generation.grids_thw, strict=True)
            ),
            processor_fingerprint=processor_fingerprint,
            assistant_payload=sample.objects,
            prompt_token_ids=generation.prompt_token_ids,
            response_token_ids=generation.response_token_ids,
            response_logprobs=generation.response_logprobs,
            request_id=request.request_id,
            purpose=request.purpose,
            optimizer_step=request.optimizer_step,
            finish_reason=generation.finish_reason,
            version_spans=generation.version_spans,
            seed=seed,
            producer=producer,
            generated_at_ms=generated_at_ms,
            generation_ms=generation_ms,
        )
        for record_id, (_, seed), sample, generation in rows
    ]
