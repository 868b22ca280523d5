"""The records that cross process boundaries, as frozen values, and their bytes.

A record on a stream is ``kind``, ``schema_version``, ``record_id``, whatever a script compares, and a
msgpack map ``body``. This module owns fields and bytes; it does not know the broker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import MalformedRecord
from broker_schemas.records import codec, upgrades
from broker_schemas.records.body_fields import BodyReader

Purpose = Literal["train", "evaluation"]
Channel = Literal["A", "B"]
NOT_STEP_BOUND: Final = -1
MAX_ID_CHARS: Final = 200
# what one rollout may cost to match: assignment is cubic in objects, transport quadratic in vertices
MAX_OBJECTS: Final = 1024
MAX_BINS: Final = 2048


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image that is named, not shipped.

    ``path`` is relative to the data root of whoever opens it, ``width`` and ``height`` are pixels of the
    stored image, ``grid_thw`` is (frames, rows, columns) of patches as the processor cut it: its product
    over merge size squared is the number of image tokens in the prompt.
    """

    path: str
    width: int
    height: int
    grid_thw: tuple[int, int, int]

    def to_body(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "grid_thw": list(self.grid_thw),
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str) -> ImageReference:
        read = BodyReader(body, where)
        grid = read.int_list("grid_thw", low=1, high=1 << 20)
        if len(grid) != 3:
            raise MalformedRecord(f"{where}.grid_thw: got {len(grid)} numbers, expected 3")
        return cls(
            path=read.text("path", max_chars=4096),
            width=read.integer("width", low=1, high=1 << 20),
            height=read.integer("height", low=1, high=1 << 20),
            grid_thw=(grid[0], grid[1], grid[2]),
        )


@dataclass(frozen=True, kw_only=True)
class GroundTruthObject:
    """One labelled object: ``desc`` and one geometry in bins 0..999.

    ``geometry`` is ``bbox_2d`` with ``bins`` (x1, y1, x2, y2), or ``poly`` with flat (x, y) pairs.
    """

    desc: str
    geometry: Literal["bbox_2d", "poly"]
    bins: tuple[int, ...]

    def to_body(self) -> dict[str, Any]:
        return {"desc": self.desc, self.geometry: list(self.bins)}

    @classmethod
    def from_body(cls, body: Mapping[str, Any], where: str) -> GroundTruthObject:
        read = BodyReader(body, where)
        names = [name for name in ("bbox_2d", "poly") if name in body]
        if len(names) != 1:
            raise MalformedRecord(f"{where}: got geometries {names}, expected exactly one of bbox_2d, poly")
        bins = tuple(read.int_list(names[0], low=0, high=999, at_most=MAX_BINS))
        if names[0] == "bbox_2d":
            if len(bins) != 4:
                raise MalformedRecord(f"{where}.bbox_2d: got {len(bins)} numbers, expected 4")
            return cls(desc=read.text("desc"), geometry="bbox_2d", bins=bins)
        if len(bins) < 6 or len(bins) % 2:
            raise MalformedRecord(f"{where}.poly: got {len(bins)} numbers, expected an even number >= 6")
        return cls(desc=read.text("desc"), geometry="poly", bins=bins)


@dataclass(frozen=True, kw_only=True)
class SegmentRecord:
    """One rollout with the policy version that wrote it: what a producer pushes.

    ``prompt_token_ids`` (P,) and ``response_token_ids`` (R,) are int32; the prompt holds the expanded image
    tokens. ``response_logprobs`` is float32 (R,) or empty. ``policy_version`` is the lowest of
    ``version_spans``, pairs (policy version, number of response tokens), empty when it never changed.
    ``optimizer_step`` names the step that asked for it, or NOT_STEP_BOUND.
    """

    KIND = "segment"
    SCHEMA_VERSION = 2

    record_id: str
    policy_version: int
    sample_id: str
    task: str
    images: tuple[ImageReference, ...]
    processor_fingerprint: str
    assistant_payload: tuple[GroundTruthObject, ...]
    prompt_token_ids: NDArray[np.int32]
    response_token_ids: NDArray[np.int32]
    response_logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    request_id: str = ""
    purpose: Purpose = "train"
    optimizer_step: int = NOT_STEP_BOUND
    finish_reason: Literal["stop", "length"] = "stop"
    version_spans: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    producer: str = ""
    generated_at_ms: int = 0
    generation_ms: int = 0

    def encode_body(self) -> bytes:
        """Return the msgpack body."""
        return codec.encode_map(
            {
                "record_id": self.record_id,
                "policy_version": self.policy_version,
                "sample_id": self.sample_id,
                "task": self.task,
                "images": [image.to_body() for image in self.images],
                "processor_fingerprint": self.processor_fingerprint,
                "assistant_payload": [item.to_body() for item in self.assistant_payload],
                "prompt_token_ids": codec.encode_array(self.prompt_token_ids, "<i4"),
                "response_token_ids": codec.encode_array(self.response_token_ids, "<i4"),
                "response_logprobs": codec.encode_array(self.response_logprobs, "<f4"),
                "request_id": self.request_id,
                "purpose": self.purpose,
                "optimizer_step": self.optimizer_step,
                "finish_reason": self.finish_reason,
                "version_spans": [list(span) for span in self.version_spans],
                "seed": self.seed,
                "producer": self.producer,
                "generated_at_ms": self.generated_at_ms,
                "generation_ms": self.generation_ms,
            }
        )

    @classmethod
    def decode_body(cls, raw: bytes, schema_version: int = SCHEMA_VERSION) -> SegmentRecord:
        """Return the record in ``raw``; raises a RecordError that names field and value."""
        body = upgrades.upgrade(
            cls.KIND, codec.decode_map(raw, is_in_place=True), schema_version, cls.SCHEMA_VERSION
        )
        where = f"segment {body.get('record_id', '?')!r:.80}"
        read = BodyReader(body, where)
        if "assistant_payload" not in body:
            raise MalformedRecord(
                f"{where}: assistant_payload is missing; a rollout cannot be matched without it"
            )
        record = cls(
            record_id=read.text("record_id", max_chars=MAX_ID_CHARS),
            policy_version=read.integer("policy_version", low=0),
            sample_id=read.text("sample_id", max_chars=MAX_ID_CHARS),
            task=read.text("task", max_chars=MAX_ID_CHARS),
            images=read.items("images", ImageReference.from_body),
            processor_fingerprint=read.text("processor_fingerprint", empty_allowed=True),
            assistant_payload=read.items(
                "assistant_payload", GroundTruthObject.from_body, at_most=MAX_OBJECTS
            ),
            prompt_token_ids=read.token_ids("prompt_token_ids"),
            response_token_ids=read.token_ids("response_token_ids"),
            response_logprobs=codec.decode_array(
                body.get("response_logprobs", b""), "<f4", field=f"{where}.response_logprobs"
            ),
            request_id=read.text("request_id", default="", empty_allowed=True, max_chars=MAX_ID_CHARS),
            purpose=read.choice("purpose", ("train", "evaluation"), default="train"),
            optimizer_step=read.integer("optimizer_step", low=NOT_STEP_BOUND, default=NOT_STEP_BOUND),
            finish_reason=read.choice("finish_reason", ("stop", "length"), default="stop"),
            version_spans=read.pairs("version_spans"),
            seed=read.integer("seed", low=0, default=0),
            producer=read.text("producer", default="", empty_allowed=True),
            generated_at_ms=read.integer("generated_at_ms", low=0, default=0),
            generation_ms=read.integer("generation_ms", low=0, default=0),
        )
        record.check(where)
        return record

    def check(self, where: str) -> None:
        """Raise MalformedRecord where fields contradict each other."""
        num_response, num_logprobs = len(self.response_token_ids), len(self.response_logprobs)
        if num_logprobs not in (0, num_response):
            raise MalformedRecord(f"{where}: got {num_logprobs} logprobs, expected 0 or {num_response}")
        if len(self.prompt_token_ids) == 0:
            raise MalformedRecord(f"{where}: got an empty prompt_token_ids, expected at least one token")
        if self.version_spans:
            lowest = min(span[0] for span in self.version_spans)
            covered = sum(span[1] for span in self.version_spans)
            if lowest != self.policy_version or covered != num_response:
                raise MalformedRecord(
                    f"{where}: version_spans {self.version_spans} give {lowest} over {covered} tokens, "
                    f"expected {self.policy_version} over {num_response}"
                )


@dataclass(frozen=True, kw_only=True)
class MatchedSegment:
    """One training sequence: what the learner trains on, and the only payload it reads.

    ``token_ids`` (N,) int32 is prompt + Y_train and end token; the first ``prompt_length`` are the prompt.
    ``ce_mask`` (N,) marks tokens that enter full-vocabulary cross-entropy (as *labels*: position i is
    predicted by the logits at i-1). ``desc_mask`` (N,) marks tokens of ``desc`` values. Slots are coordinate
    tokens with a coordinate loss: ``slot_positions`` (S,) int32 index ``token_ids``, strictly rising;
    ``slot_targets`` (S,) int16 bins; ``slot_in_prefix`` (S,) true for matched prefix slots, false for
    appended ones. ``repeat_positions`` (R,) int32, strictly rising, index the coordinate and structure
    tokens of objects that repeat an earlier one and have no target.
    ``counters`` are the counts of M-12 for this rollout. ``assistant_payload`` and ``response_tail_ids``
    (what the rollout wrote beyond the kept prefix) let it be looked at again; both are empty on A.
    """

    KIND = "matched"
    SCHEMA_VERSION = 2

    record_id: str
    channel: Channel
    policy_version: int
    sample_id: str
    task: str
    images: tuple[ImageReference, ...]
    processor_fingerprint: str
    token_ids: NDArray[np.int32]
    prompt_length: int
    ce_mask: NDArray[np.bool_]
    desc_mask: NDArray[np.bool_]
    slot_positions: NDArray[np.int32]
    slot_targets: NDArray[np.int16]
    slot_in_prefix: NDArray[np.bool_]
    repeat_positions: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    counters: Mapping[str, int] = field(default_factory=dict)
    optimizer_step: int = NOT_STEP_BOUND
    generated_at_ms: int = 0
    assistant_payload: tuple[GroundTruthObject, ...] = ()
    response_tail_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    num_response_tokens: int = 0
    producer: str = ""

    @property
    def response_token_ids(self) -> NDArray[np.int32]:
        """The rollout as it was written (R,): what the sequence shares with it, then the tail."""
        shared = self.num_response_tokens - len(self.response_tail_ids)
        kept = self.token_ids[self.prompt_length : self.prompt_length + shared]
        return np.concatenate([kept, self.response_tail_ids]).astype(np.int32)

    @property
    def encoded_length(self) -> int:
        """Tokens this segment takes in a pack: prompt, image tokens, Y_train and end token."""
        return len(self.token_ids)

    def encode_body(self) -> bytes:
        """Return the msgpack body."""
        return codec.encode_map(
            {
                "record_id": self.record_id,
                "channel": self.channel,
                "policy_version": self.policy_version,
                "sample_id": self.sample_id,
                "task": self.task,
                "images": [image.to_body() for image in self.images],
                "processor_fingerprint": self.processor_fingerprint,
                "token_ids": codec.encode_array(self.token_ids, "<i4"),
                "prompt_length": self.prompt_length,
                "ce_mask": codec.encode_mask(self.ce_mask),
                "desc_mask": codec.encode_mask(self.desc_mask),
                "slot_positions": codec.encode_array(self.slot_positions, "<i4"),
                "slot_targets": codec.encode_array(self.slot_targets, "<i2"),
                "slot_in_prefix": codec.encode_mask(self.slot_in_prefix),
                "repeat_positions": codec.encode_array(self.repeat_positions, "<i4"),
                "counters": dict(self.counters),
                "optimizer_step": self.optimizer_step,
                "generated_at_ms": self.generated_at_ms,
                "assistant_payload": [item.to_body() for item in self.assistant_payload],
                "response_tail_ids": codec.encode_array(self.response_tail_ids, "<i4"),
                "num_response_tokens": self.num_response_tokens,
                # a body of channel A, or of an earlier release, has no producer: its bytes stay as they were
                **({"producer": self.producer} if self.producer else {}),
            }
        )

    @classmethod
    def decode_body(cls, raw: bytes, schema_version: int = SCHEMA_VERSION) -> MatchedSegment:
        """Return the segment in ``raw``; raises a RecordError that names field and value."""
        body = upgrades.upgrade(
            cls.KIND, codec.decode_map(raw, is_in_place=True), schema_version, cls.SCHEMA_VERSION
        )
        where = f"matched {body.get('record_id', '?')!r:.80}"
        read = BodyReader(body, where)
        token_ids = read.token_ids("token_ids")
        slots = codec.decode_array(body.get("slot_positions"), "<i4", field=f"{where}.slot_positions")
        segment = cls(
            record_id=read.text("record_id", max_chars=MAX_ID_CHARS),
            channel=read.choice("channel", ("A", "B")),
            policy_version=read.integer("policy_version", low=0),
            sample_id=read.text("sample_id", max_chars=MAX_ID_CHARS),
            task=read.text("task", max_chars=MAX_ID_CHARS),
            images=read.items("images", ImageReference.from_body),
            processor_fingerprint=read.text("processor_fingerprint", empty_allowed=True),
            token_ids=token_ids,
            prompt_length=read.integer("prompt_length", low=1),
            ce_mask=codec.decode_mask(body.get("ce_mask"), len(token_ids), field=f"{where}.ce_mask"),
            desc_mask=codec.decode_mask(body.get("desc_mask"), len(token_ids), field=f"{where}.desc_mask"),
            slot_positions=slots,
            slot_targets=codec.decode_array(body.get("slot_targets"), "<i2", field=f"{where}.slot_targets"),
            slot_in_prefix=codec.decode_mask(
                body.get("slot_in_prefix"), len(slots), field=f"{where}.slot_in_prefix"
            ),
            # bodies beside the queue and in archives carry no version: without the field it is version 1
            repeat_positions=codec.decode_array(
                body.get("repeat_positions", b""), "<i4", field=f"{where}.repeat_positions"
            ),
            counters=read.counts("counters"),
            optimizer_step=read.integer("optimizer_step", low=NOT_STEP_BOUND, default=NOT_STEP_BOUND),
            generated_at_ms=read.integer("generated_at_ms", low=0, default=0),
            assistant_payload=read.items(
                "assistant_payload", GroundTruthObject.from_body, at_most=MAX_OBJECTS
            ),
            response_tail_ids=read.token_ids("response_tail_ids"),
            num_response_tokens=read.integer("num_response_tokens", low=0, default=0),
            producer=read.text("producer", default="", empty_allowed=True),
        )
        segment.check(where)
        return segment

    def check(self, where: str) -> None:
        """Raise MalformedRecord when a supervised index lies outside the assistant span [M-11]."""
        length, first = len(self.token_ids), self.prompt_length
        if first >= length:
            raise MalformedRecord(f"{where}: got prompt_length {first} of {length} tokens, expected less")
        shared = self.num_response_tokens - len(self.response_tail_ids)
        if not 0 <= shared <= length - first:
            raise MalformedRecord(
                f"{where}: got {shared} response tokens in the sequence, expected 0 or more"
            )
        if len(self.slot_targets) != len(self.slot_positions):
            raise MalformedRecord(
                f"{where}: got {len(self.slot_targets)} slot targets for {len(self.slot_positions)} slots"
            )
        for name, mask in (("ce_mask", self.ce_mask), ("desc_mask", self.desc_mask)):
            if mask[:first].any():
                raise MalformedRecord(f"{where}.{name}: supervises a prompt token, expected only >= {first}")
        slots, repeats = self.slot_positions, self.repeat_positions
        for name, places in (("slot_positions", slots), ("repeat_positions", repeats)):
            if len(places) and (places[0] < first or places[-1] >= length or np.any(np.diff(places) <= 0)):
                raise MalformedRecord(
                    f"{where}.{name}: got {places[0]}..{places[-1]}, "
                    f"expected rising within {first}..{length - 1}"
                )
        if self.ce_mask[repeats].any() or len(np.intersect1d(slots, repeats)):
            raise MalformedRecord(f"{where}: a token of a repeat is also trained, expected one or the other")
        if len(slots) == 0:
            return
        if self.slot_targets.min() < 0 or self.slot_targets.max() > 999:
            raise MalformedRecord(f"{where}.slot_targets: expected bins 0..999")
        if self.ce_mask[slots].any():
            raise MalformedRecord(
                f"{where}: a coordinate slot is also in ce_mask; it must be in one loss only"
            )


def wire_bytes_per_token(body: bytes, num_tokens: int) -> float:
    """Return the bytes of a body for each of its tokens [Q-3]; infinite for no tokens."""
    return len(body) / num_tokens if num_tokens else math.inf
