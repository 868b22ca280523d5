"""How weights are cut into buckets for a transfer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker_schemas.rollout_servers.transfer_plan import (
    ALIGNMENT_BYTES,
    TensorPlace,
    plan_buckets,
    update_message,
)


def tensor(name: str, num_bytes: int) -> TensorPlace:
    return TensorPlace(name=name, dtype="uint8", shape=(num_bytes,), num_bytes=num_bytes)


@given(sizes=st.lists(st.integers(0, 300), max_size=40), bucket_bytes=st.integers(1, 400))
def test_every_tensor_has_a_place_of_its_own_in_order_and_only_a_large_one_travels_alone(
    sizes: list[int], bucket_bytes: int
) -> None:
    tensors = [tensor(str(number), size) for number, size in enumerate(sizes)]

    buckets = plan_buckets(tensors, bucket_bytes)

    placed = [place for bucket in buckets for place in bucket.places]
    assert [place.name for place in placed] == [t.name for t in tensors if t.num_bytes]
    for bucket in buckets:
        end = 0
        for place in bucket.places:
            assert place.offset_bytes >= end
            assert place.offset_bytes % ALIGNMENT_BYTES == 0
            end = place.offset_bytes + place.num_bytes
        assert bucket.num_bytes == end
        assert bucket.num_bytes <= bucket_bytes or len(bucket.places) == 1


def test_a_bucket_is_filled_before_the_next_is_begun() -> None:
    buckets = plan_buckets([tensor("a", 16), tensor("b", 16), tensor("c", 1)], 32)
    assert [[place.name for place in bucket.places] for bucket in buckets] == [["a", "b"], ["c"]]


def test_no_tensors_no_buckets() -> None:
    assert plan_buckets([], 10) == []


def test_the_message_is_json_and_says_where_each_tensor_lies() -> None:
    places = [
        TensorPlace(name="w", dtype="bfloat16", shape=(2, 3), num_bytes=12),
        TensorPlace(name="b", dtype="float32", shape=(), num_bytes=4),
    ]
    assert update_message(plan_buckets(places, 64)) == {
        "buckets": [[["w", "bfloat16", [2, 3], 0], ["b", "float32", [], 16]]],
        "sizes": [20],
    }
