"""Which ground-truth samples an optimizer step trains, from seed and step alone.

Position ``optimizer_step * effective_batch_size + i`` walks through one permutation of the data set after
another, so a resume, another world size and another accumulation see the same samples in the same order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def sample_indices(
    *, optimizer_step: int, effective_batch_size: int, num_samples: int, seed: int
) -> tuple[int, ...]:
    """Return the data set indices of the step, ``effective_batch_size`` of them, in training order.

    Each epoch visits every sample once. Raises ValueError for an empty data set or batch.
    """
    if num_samples < 1 or effective_batch_size < 1 or optimizer_step < 0:
        raise ValueError(
            f"sample indices: got optimizer_step {optimizer_step}, effective_batch_size "
            f"{effective_batch_size}, {num_samples} samples; expected a step from 0 and at least one "
            "of the others"
        )
    first = optimizer_step * effective_batch_size
    positions = range(first, first + effective_batch_size)
    return tuple(
        int(_epoch_order(seed, position // num_samples, num_samples)[position % num_samples])
        for position in positions
    )


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def share_of_rank(num_items: int, rank: int, world_size: int) -> range:
    """Return the contiguous positions of ``rank``; shares differ by one at most, lower ranks take more."""
    smaller, num_larger = divmod(num_items, world_size)
    first = rank * smaller + min(rank, num_larger)
    return range(first, first + smaller + (rank < num_larger))


def plan_rows(lengths: list[int], *, capacity_tokens: int, num_micro_steps: int) -> list[list[int]]:
    """Return the indices of each packed row, in order: ``num_micro_steps`` even groups, cut where too long.

    No lengths: no rows. Raises ValueError for a length above the capacity, naming its index.
    """
    rows: list[list[int]] = []
    for group in range(num_micro_steps):
        row: list[int] = []
        filled_tokens = 0
        for index in share_of_rank(len(lengths), group, num_micro_steps):
            if lengths[index] > capacity_tokens:
                raise ValueError(
                    f"segment {index}: {lengths[index]} tokens, expected at most {capacity_tokens}"
                )
            if row and filled_tokens + lengths[index] > capacity_tokens:
                rows.append(row)
                row, filled_tokens = [], 0
            row.append(index)
            filled_tokens += lengths[index]
        if row:
            rows.append(row)
    return rows
