"""Why a rollout or an object was dropped or rejected, or a B step skipped: each once, for all pages."""

from __future__ import annotations

from typing import Final, Literal, get_args

DropReason = Literal[
    "stale",  # older than the oldest policy version that may still be trained
    "overflow",  # the oldest pack of a full ready queue
    "oversized",  # longer than any pack
    "duplicate",  # its id is matched already
    "malformed_descriptor",  # the packer cannot read what the matcher wrote
]
RejectionReason = Literal[
    "record_error",
    "malformed",
    "schema_too_new",
    "too_large",
    "body_missing",  # its bytes are no longer in the broker
    "line_differs",  # its line in the log says other than its body
    "version_unknown",  # made by a policy version that was never published
    "judging_failed",  # an error of ours while it was judged
    "killed_its_matcher",  # pending through two deaths of a matcher, the second time alone
    "image_unusable",  # the learner could not open it, or would cut it otherwise
    "not_admitted",  # an entry that no transition wrote
    "generation_failed",  # its request failed in every attempt
    "abandoned",  # its request was given up: no producer finished it
    "fragment_not_encoded",
    "record_malformed",
    "token_id_out_of_vocab",
    "ground_truth_malformed",
    "logprobs_not_finite",
    "image_missing",
    "segment_too_long",
    "image_token_in_answer",
    "image_tokens_differ",
    "image_outside_root",
    "quarantined_image",  # its image cannot be opened any more
    "quarantined_loss",  # its loss is not finite
    "quarantined_segment",  # it contradicts itself, its image or the model
    "quarantined_by_hand",  # `rollstream quarantine`
]
QuarantineReason = Literal[
    "quarantined_image", "quarantined_loss", "quarantined_segment", "quarantined_by_hand"
]
# why an object of a rollout is dropped in parsing, in the order in which it is looked for; `unbalanced` is
# found by the scan, before any of the others
ObjectDropReason = Literal[
    "malformed_json",
    "key_invalid",
    "duplicate_key",
    "missing_desc",
    "missing_geom",
    "unknown_geom",
    "non_coord_token",
    "wrong_arity",
    "bbox_invalid",
    "unbalanced",
]

DROP_REASONS: Final[tuple[DropReason, ...]] = get_args(DropReason)
REJECTION_REASONS: Final[tuple[RejectionReason, ...]] = get_args(RejectionReason)
OBJECT_DROP_REASONS: Final[tuple[ObjectDropReason, ...]] = get_args(ObjectDropReason)
# why a scheduled B step became A: not every rank had its fresh packs
SKIP_REASONS: Final = ("queue_short",)
