"""Bytes that were written once stay readable for ever: each record kind and schema version has its file.

A changed record gets a new file beside the old one, and an upgrade; no file here is ever written again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker_schemas.errors import SchemaTooNew
from broker_schemas.records import codec
from broker_schemas.records.packs import MatchedDescriptor, ReadyPack, StepClaim
from broker_schemas.records.records import GroundTruthObject, ImageReference, MatchedSegment, SegmentRecord

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IMAGE = ImageReference(path="images/\u5bfe.png", width=640, height=480, grid_thw=(1, 16, 12))
SEGMENT = SegmentRecord(
    record_id="run-00000017.3",
    policy_version=4,
    sample_id="train-000017",
    task="poly",
    images=(IMAGE,),
    processor_fingerprint="00112233aabbccdd",
    assistant_payload=(
        GroundTruthObject(desc="caf\u00e9", geometry="bbox_2d", bins=(0, 20, 300, 999)),
        GroundTruthObject(desc="leaf", geometry="poly", bins=(1, 2, 30, 4, 15, 60)),
    ),
    prompt_token_ids=np.array([1, 2, 70_000, 2**31 - 1], np.int32),
    response_token_ids=np.array([90, 91, 2], np.int32),
    response_logprobs=np.array([-0.5, -1.25, 0.0], np.float32),
    request_id="run-00000017",
    purpose="evaluation",
    optimizer_step=12,
    finish_reason="length",
    version_spans=((5, 2), (4, 1)),
    seed=77,
    producer="producer-0",
    generated_at_ms=1_767_225_600_000,
    generation_ms=1_234,
)
MATCHED = MatchedSegment(
    record_id="run-00000017.3",
    channel="B",
    policy_version=4,
    sample_id="train-000017",
    task="poly",
    images=(IMAGE,),
    processor_fingerprint="00112233aabbccdd",
    token_ids=np.array([1, 2, 3, 500, 501, 502, 503, 9, 8, 7], np.int32),
    prompt_length=3,
    ce_mask=np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 1], np.bool_),
    desc_mask=np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0], np.bool_),
    slot_positions=np.array([3, 4, 5, 6], np.int32),
    slot_targets=np.array([0, 1, 998, 999], np.int16),
    slot_in_prefix=np.array([True, True, False, False]),
    repeat_positions=np.array([8], np.int32),
    counters={"valid_objects": 2, "dropped_wrong_arity": 1},
    optimizer_step=12,
    generated_at_ms=1_767_225_600_000,
)
DESCRIPTOR = MatchedDescriptor(
    record_id="run-00000017.3",
    policy_version=4,
    encoded_length=10,
    optimizer_step=12,
)
PACK = ReadyPack(pack_id="p-1", record_ids=("a", "b"), lengths=(10, 20), policy_version=4, fill=0.9375)
CLAIM = StepClaim(
    optimizer_step=12, kind="B", reason="claimed", policy_version=6, packs=((PACK,), (PACK,)), short_ranks=()
)
NEWEST: dict[str, bytes] = {
    f"segment-{SegmentRecord.SCHEMA_VERSION}": SEGMENT.encode_body(),
    f"matched-{MatchedSegment.SCHEMA_VERSION}": MATCHED.encode_body(),
    "pack-1": codec.encode_map(PACK.to_body()),
    "claim-1": codec.encode_map(CLAIM.to_body()),
}


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def plain(record: Any) -> dict[str, Any]:
    """Return the fields with arrays as lists, so that they compare."""
    values = ((item.name, getattr(record, item.name)) for item in dataclasses.fields(record))
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values}


@pytest.mark.req("Q-3")
@pytest.mark.parametrize("name", sorted(NEWEST))
def test_a_record_is_written_as_it_always_was(name: str) -> None:
    assert NEWEST[name] == golden(name), "the bytes changed: raise SCHEMA_VERSION, add an upgrade and a file"


@pytest.mark.req("Q-3")
@pytest.mark.parametrize("schema_version", range(1, SegmentRecord.SCHEMA_VERSION + 1))
def test_a_rollout_of_every_schema_version_is_read_in_full(schema_version: int) -> None:
    raw = golden(f"segment-{schema_version}")
    assert plain(SegmentRecord.decode_body(raw, schema_version)) == plain(SEGMENT)


@pytest.mark.req("Q-3")
@pytest.mark.parametrize("schema_version", range(1, MatchedSegment.SCHEMA_VERSION + 1))
def test_a_training_segment_of_every_schema_version_is_read_in_full(schema_version: int) -> None:
    raw = golden(f"matched-{schema_version}")
    known = plain(MATCHED) if schema_version > 1 else plain(MATCHED) | {"repeat_positions": []}
    assert plain(MatchedSegment.decode_body(raw, schema_version)) == known
    assert plain(MatchedSegment.decode_body(raw)) == known, "payloads and archives carry no version"


@pytest.mark.req("Q-3")
def test_descriptor_pack_and_claim_are_read_in_full() -> None:
    assert MatchedDescriptor.decode_body(golden("descriptor-1")) == DESCRIPTOR
    assert ReadyPack.from_body(codec.decode_map(golden("pack-1"))) == PACK
    assert StepClaim.from_body(codec.decode_map(golden("claim-1"))) == CLAIM


@pytest.mark.req("Q-3")
def test_a_later_schema_version_is_refused() -> None:
    for kind in (SegmentRecord, MatchedSegment):
        newest = kind.SCHEMA_VERSION
        with pytest.raises(SchemaTooNew, match=f"got schema_version {newest + 1}"):
            kind.decode_body(golden(f"{kind.KIND}-{newest}"), newest + 1)


@pytest.mark.req("Q-3")
def test_every_file_belongs_to_a_kind_and_version_that_is_tested() -> None:
    versions = {"segment": SegmentRecord.SCHEMA_VERSION, "matched": MatchedSegment.SCHEMA_VERSION}
    known = {f"{kind}-{number}" for kind, newest in versions.items() for number in range(1, newest + 1)}
    assert {path.stem for path in GOLDEN.glob("*.bin")} == known | set(NEWEST) | {"descriptor-1"}
