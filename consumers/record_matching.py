"""From one rollout record to its outcome: a training segment, an evaluation result or a rejection.

The one pure function that the matcher's loop calls; it must not know streams, metrics or files.
"""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import DataError, RecordError
from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.image_check import ImageCheck
from broker_schemas.records.reasons import RejectionReason
from broker_schemas.records.records import MAX_OBJECTS, GroundTruthObject, MatchedSegment, SegmentRecord
from consumers.evaluation_result import EvaluationResult, evaluate_rollout, unusable_rollout
from consumers.fragments import FragmentNotEncoded
from consumers.matching import MatchResult, MatchSettings, match_objects
from consumers.overlap_counts import duplicate_predictions
from consumers.parsing import END_TOKEN, ParsedRollout, parse_rollout
from consumers.segments import SegmentVocabulary, build_segment, rollout_counters
from consumers.token_bytes import backend_of, token_bytes_of
from consumers.transport_targets import TransportSettings, targets_of_pairs

MAX_RESPONSE_TOKENS: Final = 16_384
TOO_LONG_ADVICE: Final = (
    "raise training.global_max_length, or lower the image bounds or "
    "custom.extra.rollout_matching.max_new_tokens"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatcherTools:
    """What every record of a run is matched with.

    ``capacity`` is the longest segment in tokens (the packing length). ``num_token_ids`` is the width of
    the model's embedding, ids from there on are impossible; None takes the tokenizer's. ``image_token_ids``
    are the ids that stand for pixels: an answer that holds one cannot be trained on. ``merge_size`` is the
    patches a side of one of them; None leaves the number of image tokens in the prompt unchecked. ``images``
    looks at the files that the learner will open; None leaves them unchecked.
    Raises DataError for a tokenizer or ids that cannot serve.
    """

    tokenizer: Any
    coord_vocab: CoordVocabulary
    end_token_id: int
    capacity: int
    match_settings: MatchSettings
    transport_settings: TransportSettings
    num_token_ids: int | None = None
    image_token_ids: frozenset[int] = frozenset()
    merge_size: int | None = None
    images: ImageCheck | None = None

    def __post_init__(self) -> None:
        table = token_bytes_of(self.tokenizer)
        try:
            table.spell(b"{")
        except ValueError as exc:
            raise DataError(f"matcher: {exc}") from exc
        if self.num_token_ids is None:
            object.__setattr__(self, "num_token_ids", table.num_ids)
        self.coord_vocab.check_logits_width(self.width)
        if not 0 <= self.end_token_id < self.width:
            raise DataError(
                f"matcher: got end_token_id {self.end_token_id}, expected below {self.width} token ids; "
                f"look it up as {END_TOKEN}"
            )
        if self.capacity < 1:
            raise DataError(f"matcher: got a capacity of {self.capacity} tokens, expected at least 1")

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, *, capacity: int, **others: Any) -> MatcherTools:
        """Look up coordinate and end tokens in ``tokenizer``; raises DataError where one is missing."""
        backend = backend_of(tokenizer)
        end_token_id = backend.token_to_id(END_TOKEN)
        if end_token_id is None:
            raise DataError(f"tokenizer: got no token {END_TOKEN}, expected one; add it as a special token")
        return cls(
            tokenizer=backend,
            coord_vocab=CoordVocabulary.from_token_to_id(backend.token_to_id),
            end_token_id=end_token_id,
            capacity=capacity,
            **others,
        )

    @property
    def width(self) -> int:
        """Number of token ids."""
        assert self.num_token_ids is not None, "set when built"
        return self.num_token_ids

    @property
    def vocabulary(self) -> SegmentVocabulary:
        return SegmentVocabulary(
            tokenizer=self.tokenizer, coord_vocab=self.coord_vocab, end_token_id=self.end_token_id
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a record cannot be used; ``detail`` says what, got, expected and where."""

    reason: RejectionReason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ParseFailure:
    """A rollout worth looking at: its text, and why (drop reasons, ``truncated``, ``invalid_rollout``)."""

    record_id: str
    sample_id: str
    image_paths: tuple[str, ...]
    text: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchOutcome:
    """Exactly one of ``segment``, ``evaluation`` and ``rejection``; ``counters`` are those of M-12."""

    segment: MatchedSegment | None = None
    evaluation: EvaluationResult | None = None
    rejection: Rejection | None = None
    parse_failure: ParseFailure | None = None
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedRollout:
    """The stages of one record, for whoever shows them: ``targets[i]`` belong to ``match.pairs[i]``;
    ``duplicates`` are the predictions that repeat an earlier one.
    """

    parsed: ParsedRollout
    match: MatchResult
    targets: tuple[list[int] | None, ...]
    duplicates: tuple[int, ...]


def match_record(record: SegmentRecord, tools: MatcherTools) -> MatchOutcome:
    """Return what becomes of ``record``: a segment, for an evaluation record its result, or a rejection.

    Never raises for content of the record.
    """
    rejection = _record_problem(record, tools)
    if rejection is not None:
        return MatchOutcome(rejection=rejection)
    rejection = _response_problem(record, tools)
    if rejection is not None:
        return _unusable(record, rejection)
    parsed = parse_rollout(record.response_token_ids, tools.tokenizer, tools.coord_vocab)
    rejection = _size_problem(record, parsed, tools)
    if rejection is not None:
        return _unusable(record, rejection)
    rollout = match_parsed(record, parsed, tools)
    failure = _parse_failure(record, rollout.parsed, tools)
    counters = rollout_counters(rollout.parsed, rollout.match, num_duplicates=len(rollout.duplicates))
    if record.purpose == "evaluation":
        text = token_bytes_of(tools.tokenizer).text(record.response_token_ids)
        result = evaluate_rollout(record, rollout.parsed, rollout.match, text, tools.match_settings)
        return MatchOutcome(evaluation=result, parse_failure=failure, counters=counters)
    try:
        segment = build_segment(
            record, rollout.parsed, rollout.match, rollout.targets, tools.vocabulary, rollout.duplicates
        )
    except FragmentNotEncoded as exc:
        rejection = Rejection(reason="fragment_not_encoded", detail=f"segment {record.record_id}: {exc}")
    else:
        rejection = _segment_problem(segment, tools)
    if rejection is not None:
        return MatchOutcome(rejection=rejection, parse_failure=failure, counters=counters)
    return MatchOutcome(segment=segment, parse_failure=failure, counters=dict(segment.counters))


def _unusable(record: SegmentRecord, rejection: Rejection) -> MatchOutcome:
    """Return the rejection of an answer that cannot be used; to evaluate it is an answer without objects."""
    if record.purpose != "evaluation":
        return MatchOutcome(rejection=rejection)
    return MatchOutcome(evaluation=unusable_rollout(record), counters={"rollouts": 1, "invalid_rollouts": 1})


def match_rollout(record: SegmentRecord, tools: MatcherTools) -> MatchedRollout:
    """Parse and match one record and find its targets; an evaluation record has none."""
    return match_parsed(
        record, parse_rollout(record.response_token_ids, tools.tokenizer, tools.coord_vocab), tools
    )


def match_parsed(record: SegmentRecord, parsed: ParsedRollout, tools: MatcherTools) -> MatchedRollout:
    """Match what was parsed of ``record`` and find its targets; an evaluation record has none."""
    truth = record.assistant_payload
    match = match_objects(parsed.objects, truth, tools.match_settings)
    trained = match.pairs if record.purpose == "train" else ()
    pairs = [(parsed.objects[prediction], truth[index]) for prediction, index in trained]
    targets = targets_of_pairs(pairs, tools.transport_settings)
    return MatchedRollout(
        parsed=parsed,
        match=match,
        targets=tuple(targets),
        duplicates=duplicate_predictions(parsed.objects, tools.match_settings),
    )


def _record_problem(record: SegmentRecord, tools: MatcherTools) -> Rejection | None:
    where = f"segment {record.record_id}"
    try:
        record.check(where)
    except RecordError as exc:
        return Rejection(reason="record_malformed", detail=str(exc))
    least = len(record.prompt_token_ids) + 4 * len(record.assistant_payload)
    if record.purpose == "train" and least > tools.capacity:
        # each true object is in the sequence: appended with its own bins, or matched to a prediction of the
        # prefix with at least four coordinate tokens
        detail = f"{where}: got {least} tokens or more, expected at most {tools.capacity}"
        return Rejection(reason="segment_too_long", detail=f"{detail}; {TOO_LONG_ADVICE}")
    problem = _ids_problem(record.prompt_token_ids, tools, f"{where}.prompt_token_ids")
    if problem is not None:
        return Rejection(reason="token_id_out_of_vocab", detail=problem)
    for index, item in enumerate(record.assistant_payload):
        problem = _ground_truth_problem(item, f"{where}.assistant_payload[{index}]")
        if problem is not None:
            return Rejection(reason="ground_truth_malformed", detail=problem)
    problem_of_images = _images_problem(record, tools, where)
    if problem_of_images is not None:
        return problem_of_images
    if record.purpose == "evaluation" and not record.images:
        detail = f"{where}.images: got none, expected the image that was evaluated"
        return Rejection(reason="image_missing", detail=detail)
    return None


def _response_problem(record: SegmentRecord, tools: MatcherTools) -> Rejection | None:
    """Refuse, before any work, an answer that no parsing could use."""
    where = f"segment {record.record_id}"
    longest, num_tokens = max(MAX_RESPONSE_TOKENS, 2 * tools.capacity), len(record.response_token_ids)
    if num_tokens > longest:
        detail = f"{where}.response_token_ids: got {num_tokens} tokens, expected {longest} at most"
        return Rejection(reason="segment_too_long", detail=f"{detail}; {TOO_LONG_ADVICE}")
    problem = _ids_problem(record.response_token_ids, tools, f"{where}.response_token_ids")
    if problem is not None:
        return Rejection(reason="token_id_out_of_vocab", detail=problem)
    if not np.isfinite(record.response_logprobs).all():
        detail = f"{where}.response_logprobs: got a value that is not finite, expected log-probabilities"
        return Rejection(reason="logprobs_not_finite", detail=detail)
    return None


def _ids_problem(ids: NDArray[np.int32], tools: MatcherTools, where: str) -> str | None:
    if not len(ids) or (int(np.max(ids)) < tools.width and int(np.min(ids)) >= 0):
        return None
    found = f"{where}: got {int(np.min(ids))}..{int(np.max(ids))}"
    return f"{found}, expected ids from 0 to {tools.width - 1}; producer and matcher must share a tokenizer"


def _is_within_root(path: str) -> bool:
    """Say whether a relative path stays below its root; the learner would refuse it, and stop."""
    plain = posixpath.normpath(path)
    return bool(path) and "\0" not in path and plain != "." and plain.split("/")[0] not in ("..", "")


def _image_token_problem(record: SegmentRecord, tools: MatcherTools, where: str) -> str | None:
    if tools.merge_size is None:
        return None
    wanted = sum(math.prod(image.grid_thw) for image in record.images) // tools.merge_size**2
    found = int(np.isin(record.prompt_token_ids, list(tools.image_token_ids)).sum())
    if found == wanted:
        return None
    return f"{where}.prompt_token_ids: got {found} image tokens, expected the {wanted} of grid_thw"


def _ground_truth_problem(item: GroundTruthObject, where: str) -> str | None:
    try:
        GroundTruthObject.from_body(item.to_body(), where)
        item.desc.encode()
    except RecordError as exc:
        return str(exc)
    except UnicodeEncodeError as exc:
        return f"{where}.desc: got {item.desc!r:.80}, expected text ({exc.reason})"
    if item.geometry == "bbox_2d" and (item.bins[2] <= item.bins[0] or item.bins[3] <= item.bins[1]):
        return f"{where}.bbox_2d: got {list(item.bins)}, expected x1 < x2 and y1 < y2"
    if not item.desc.strip() or len(item.desc.splitlines()) != 1:
        return f"{where}.desc: got {item.desc!r:.80}, expected one line that is not empty"
    return None


def _size_problem(record: SegmentRecord, parsed: ParsedRollout, tools: MatcherTools) -> Rejection | None:
    """Refuse, before the matching, a prefix that fits no pack or more objects than the matching may cost."""
    where = f"segment {record.record_id}"
    if len(parsed.objects) > MAX_OBJECTS:
        detail = f"{where}: got {len(parsed.objects)} predicted objects, expected at most {MAX_OBJECTS}"
        return Rejection(reason="segment_too_long", detail=detail)
    least = len(record.prompt_token_ids) + len(parsed.prefix_ids)
    if record.purpose == "train" and least > tools.capacity:
        detail = f"{where}: got {least} tokens or more, expected at most {tools.capacity}"
        return Rejection(reason="segment_too_long", detail=f"{detail}; {TOO_LONG_ADVICE}")
    return None


def _images_problem(record: SegmentRecord, tools: MatcherTools, where: str) -> Rejection | None:
    for index, image in enumerate(record.images):
        if not _is_within_root(image.path):
            detail = f"{where}.images[{index}]: got path {image.path!r:.80}, expected one below the data root"
            return Rejection(reason="image_outside_root", detail=detail)
    problem = _image_token_problem(record, tools, where)
    if problem is not None:
        return Rejection(reason="image_tokens_differ", detail=problem)
    for index, image in enumerate(record.images):
        is_checked = tools.images is not None and record.purpose == "train"
        problem = tools.images.problem(image) if is_checked and tools.images else None
        if problem is not None:
            return Rejection(reason="image_unusable", detail=f"{where}.images[{index}]: {problem}")
    return None


def _segment_problem(segment: MatchedSegment, tools: MatcherTools) -> Rejection | None:
    where = f"segment {segment.record_id}"
    if segment.encoded_length > tools.capacity:
        detail = f"{where}: got {segment.encoded_length} tokens, expected at most {tools.capacity}"
        return Rejection(reason="segment_too_long", detail=f"{detail}; {TOO_LONG_ADVICE}")
    answer = segment.token_ids[segment.prompt_length :].tolist()
    pixels = sorted(tools.image_token_ids.intersection(answer))
    if pixels:
        detail = f"{where}: got image tokens {pixels} in the answer, expected them in the prompt alone"
        return Rejection(reason="image_token_in_answer", detail=detail)
    return None


def _parse_failure(record: SegmentRecord, parsed: ParsedRollout, tools: MatcherTools) -> ParseFailure | None:
    reasons = sorted(parsed.dropped)
    reasons += ["truncated"] if parsed.truncated else []
    reasons += ["invalid_rollout"] if parsed.is_invalid_rollout else []
    if not reasons:
        return None
    return ParseFailure(
        record_id=record.record_id,
        sample_id=record.sample_id,
        image_paths=tuple(image.path for image in record.images),
        text=token_bytes_of(tools.tokenizer).text(record.response_token_ids),
        reasons=tuple(reasons),
    )
