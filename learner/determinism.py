"""The same inputs give the same bits: fixed threads, deterministic kernels, a seed for each step."""

from __future__ import annotations

import hashlib

import torch


def fix_arithmetic(num_threads: int, *, is_cpu: bool) -> None:
    """Set the thread count (0: as torch chooses) and, on the CPU, refuse kernels that are not deterministic.

    On a GPU such kernels only warn: some of the model's have no deterministic form there.
    """
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=not is_cpu)
    # filling every new tensor only matters to kernels that read memory that nobody wrote
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_step(seed: int, optimizer_step: int, rank: int) -> None:
    """Seed torch for one optimizer step on one rank; a resume then needs no random state of the others."""
    digest = hashlib.sha256(f"{seed}:{optimizer_step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
