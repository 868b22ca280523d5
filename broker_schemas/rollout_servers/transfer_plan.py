"""How published weights are cut into buckets of bytes for a transfer to rollout servers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

# a view of another number format must begin at a multiple of its size
ALIGNMENT_BYTES: Final = 16


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """One tensor in a bucket; ``dtype`` is the name of a torch dtype, ``offset_bytes`` where it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that travel as one row of ``num_bytes`` bytes."""

    places: tuple[TensorPlace, ...]
    num_bytes: int


def plan_buckets(tensors: Sequence[TensorPlace], bucket_bytes: int) -> list[Bucket]:
    """Return buckets of at most ``bucket_bytes`` that hold ``tensors`` in their order; none for none.

    A larger tensor travels alone. Tensors of no elements are left out: there is nothing to send.
    """
    buckets: list[Bucket] = []
    places: list[TensorPlace] = []
    end = 0
    for tensor in tensors:
        if prod(tensor.shape) == 0:
            continue
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if places and start + tensor.num_bytes > bucket_bytes:
            buckets.append(Bucket(places=tuple(places), num_bytes=end))
            places, start = [], 0
        places.append(
            TensorPlace(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                num_bytes=tensor.num_bytes,
                offset_bytes=start,
            )
        )
        end = start + tensor.num_bytes
    if places:
        buckets.append(Bucket(places=tuple(places), num_bytes=end))
    return buckets


def update_message(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """Return what a server must know to receive ``buckets``, as JSON."""
    return {
        "buckets": [
            [[place.name, place.dtype, list(place.shape), place.offset_bytes] for place in bucket.places]
            for bucket in buckets
        ],
        "sizes": [bucket.num_bytes for bucket in buckets],
    }
