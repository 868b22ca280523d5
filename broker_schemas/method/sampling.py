"""Which sample comes at which position: seeded passes over the data set, a function of the position alone.

Positions count from the start of the run, so a resumed reader goes on exactly where it was.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=8)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order (N,) in which pass number ``epoch`` visits the samples; read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.setflags(write=False)
    return order


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """Return the index of the sample at ``position`` (>= 0); raises ValueError for an empty data set."""
    if num_samples < 1 or position < 0:
        raise ValueError(f"sample_at: got position {position} of {num_samples} samples, expected both valid")
    return int(epoch_order(num_samples, seed, position // num_samples)[position % num_samples])


def rollout_seed(position: int, seed: int) -> int:
    """Return the seed of the rollout at ``position``, 31 bits, well spread."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0] >> 1)
