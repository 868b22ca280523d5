"""A large body is decoded where it lies: its arrays are views of the bytes that came."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_schemas.errors import MalformedRecord
from broker_schemas.records import codec
from broker_schemas.records.records import MatchedSegment, SegmentRecord
from tests.builders.records import a_rollout, a_segment

NUM_TOKENS = 100_000
LEAVES = st.none() | st.integers(-9, 9) | st.text(max_size=9) | st.binary(max_size=9)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def assert_lies_in(array: np.ndarray[Any, Any], raw: bytes) -> None:
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))


@pytest.mark.req("Q-3")
def test_the_arrays_of_a_large_rollout_are_views_of_its_body() -> None:
    rollout = a_rollout(
        prompt_token_ids=np.arange(1, NUM_TOKENS, dtype=np.int32),
        response_token_ids=np.arange(NUM_TOKENS, dtype=np.int32),
        response_logprobs=np.linspace(-1, 0, NUM_TOKENS, dtype=np.float32),
    )
    raw = rollout.encode_body()
    found = SegmentRecord.decode_body(raw)
    for name in ("prompt_token_ids", "response_token_ids", "response_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rollout, name))
        assert_lies_in(getattr(found, name), raw)
    assert (found.record_id, found.images, found.assistant_payload) == (
        *(rollout.record_id, rollout.images, rollout.assistant_payload),
    )


@pytest.mark.req("Q-3")
def test_the_tokens_of_a_large_segment_are_a_view_of_its_body() -> None:
    segment = a_segment(num_tokens=NUM_TOKENS)
    raw = segment.encode_body()
    found = MatchedSegment.decode_body(raw)
    np.testing.assert_array_equal(found.token_ids, segment.token_ids)
    np.testing.assert_array_equal(found.ce_mask, segment.ce_mask)
    assert_lies_in(found.token_ids, raw)


@pytest.mark.req("Q-3", "Q-13")
@given(
    before=st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    after=st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    size=st.integers(codec.WINDOW_BYTES - 20, codec.WINDOW_BYTES + 20),
    cut=st.integers(0, 30),
    added=st.binary(max_size=3),
)
def test_in_place_or_copied_a_map_is_the_same(
    before: dict[str, Any], after: dict[str, Any], size: int, cut: int, added: bytes
) -> None:
    """Given any map around a long binary value, whole, cut short or with bytes too many."""
    raw = bytes(msgpack.packb({**before, "long": bytes(size), **after}))
    raw = raw[: len(raw) - cut] + added
    assert judged(raw, is_in_place=True) == judged(raw, is_in_place=False)


def judged(raw: bytes, *, is_in_place: bool) -> object:
    """Return the map with plain bytes in it, or what was said of it."""
    try:
        found = codec.decode_map(raw, is_in_place=is_in_place)
    except MalformedRecord as exc:
        return str(exc)
    return {key: bytes(value) if isinstance(value, memoryview) else value for key, value in found.items()}


@pytest.mark.req("Q-13")
@pytest.mark.parametrize(
    "head", [b"\xdf\xff\xff\xff\xff", b"\xde\xff\xff", b"\x8f", b"\x81\xa1x\xc6\xff\xff\xff\xff"]
)
def test_a_large_body_that_claims_more_than_it_has_is_refused(head: bytes) -> None:
    with pytest.raises(MalformedRecord):
        codec.decode_map(head + bytes(codec.WINDOW_BYTES), is_in_place=True)
