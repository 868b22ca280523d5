"""Builds training sequences: kept prefix, missing ground truth, end token, and what each token learns.

Owns section 7 of the method; it must not know the broker, and sees no clock and no random source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.records.records import MatchedSegment, SegmentRecord
from consumers.fragments import Fragment, encode_fragment
from consumers.matching import MatchResult
from consumers.parsing import ParsedRollout
from consumers.repeats import repeat_tokens

TargetBins = Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentVocabulary:
    """What a segment is written with: ``end_token_id`` is the id of ``<|im_end|>``."""

    tokenizer: Any
    coord_vocab: CoordVocabulary
    end_token_id: int


def build_segment(
    record: SegmentRecord,
    parsed: ParsedRollout,
    match: MatchResult,
    targets: Sequence[TargetBins | None],
    vocabulary: SegmentVocabulary,
    duplicates: Sequence[int] = (),
) -> MatchedSegment:
    """Return the training sequence of ``record`` (ROLLOUT_MATCHING section 7).

    ``targets[i]`` are the target bins of ``match.pairs[i]``, as many as its prediction has, or None for a
    pair without a target: it is excluded and its ground truth appended. Appended objects keep the order of
    the record. Nothing to append gives the kept text closed by ``}``. ``duplicates`` are predictions that
    repeat an earlier one; the tokens of those without a target are marked. Raises FragmentNotEncoded.
    """
    excluded = [truth for (_, truth), target in zip(match.pairs, targets, strict=True) if target is None]
    appended = sorted([*match.unmatched_ground_truth, *excluded])
    fragment = encode_fragment(
        parsed,
        [record.assistant_payload[index] for index in appended],
        vocabulary.tokenizer,
        vocabulary.coord_vocab,
    )
    prefix_slots = sorted(
        slot
        for (prediction, _), target in zip(match.pairs, targets, strict=True)
        if target is not None
        for slot in zip(parsed.objects[prediction].token_indices, target, strict=True)
    )
    trained = {pair[0] for pair, target in zip(match.pairs, targets, strict=True) if target is not None}
    repeated = repeat_tokens(
        parsed, [index for index in duplicates if index not in trained], vocabulary.tokenizer
    )
    counters = rollout_counters(parsed, match, num_excluded=len(excluded), num_duplicates=len(duplicates))
    counters |= {"prefix_slots": len(prefix_slots), "appended_slots": len(fragment.slot_bins)}
    return _assemble(record, parsed, fragment, prefix_slots, repeated, vocabulary.end_token_id, counters)


def rollout_counters(
    parsed: ParsedRollout, match: MatchResult, num_excluded: int = 0, num_duplicates: int = 0
) -> dict[str, int]:
    """Return the counts of M-12 for one rollout; ``dropped_<reason>`` where that reason occurred."""
    num_matched = len(match.pairs) - num_excluded
    num_unmatched = len(match.unmatched_ground_truth) + num_excluded
    counters = {
        "rollouts": 1,
        "valid_objects": len(parsed.objects),
        "ground_truth_objects": len(match.pairs) + len(match.unmatched_ground_truth),
        "matched": num_matched,
        "unmatched_appended": num_unmatched,
        "duplicates": num_duplicates,
        "gating_rejections": match.gating_rejections,
        "targets_excluded": num_excluded,
        "truncated": int(parsed.truncated),
        "invalid_rollouts": int(parsed.is_invalid_rollout),
    }
    return counters | {f"dropped_{reason}": count for reason, count in sorted(parsed.dropped.items())}


def _assemble(
    record: SegmentRecord,
    parsed: ParsedRollout,
    fragment: Fragment,
    prefix_slots: Sequence[tuple[int, int]],
    repeated: Sequence[int],
    end_token_id: int,
    counters: dict[str, int],
) -> MatchedSegment:
    prompt = np.asarray(record.prompt_token_ids, dtype=np.int32)
    prefix_start = len(prompt)
    fragment_start = prefix_start + len(parsed.prefix_ids)
    token_ids = np.concatenate(
        [prompt, np.asarray(parsed.prefix_ids, np.int32), fragment.ids, np.asarray([end_token_id], np.int32)]
    )
    appended_slots = fragment.slot_positions + fragment_start
    slots = np.concatenate([[index + prefix_start for index, _ in prefix_slots], appended_slots])
    slot_targets = np.concatenate([[target for _, target in prefix_slots], fragment.slot_bins])
    desc_mask = np.zeros(len(token_ids), dtype=np.bool_)
    desc_mask[fragment_start:-1] = fragment.desc_mask
    ce_mask = np.zeros(len(token_ids), dtype=np.bool_)
    first_appended = fragment_start + fragment.num_kept
    ce_mask[first_appended:] = ~desc_mask[first_appended:]
    ce_mask[appended_slots] = False
    response = record.response_token_ids
    num_shared = _num_shared(response, token_ids[prefix_start:])
    return MatchedSegment(
        record_id=record.record_id,
        channel="B",
        policy_version=record.policy_version,
        sample_id=record.sample_id,
        task=record.task,
        images=record.images,
        processor_fingerprint=record.processor_fingerprint,
        token_ids=token_ids,
        prompt_length=prefix_start,
        ce_mask=ce_mask,
        desc_mask=desc_mask,
        slot_positions=slots.astype(np.int32),
        slot_targets=slot_targets.astype(np.int16),
        slot_in_prefix=np.arange(len(slots)) < len(prefix_slots),
        repeat_positions=np.asarray([index + prefix_start for index in repeated], dtype=np.int32),
        counters=counters,
        optimizer_step=record.optimizer_step,
        generated_at_ms=record.generated_at_ms,
        assistant_payload=record.assistant_payload,
        response_tail_ids=np.asarray(response[num_shared:], dtype=np.int32),
        num_response_tokens=len(response),
        producer=record.producer,
    )


def _num_shared(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """Return how many tokens both begin with."""
    shorter = min(len(left), len(right))
    differs = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differs[0]) if len(differs) else shorter
