"""Starts the ranks of a test as real processes that meet through a file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learner.determinism import fix_arithmetic
from learner.distributed import Ranks, connect

RankBody = Callable[[int, Path], None]


def run_ranks(body: RankBody, folder: Path, world_size: int = 2, *, timeout_s: float = 100) -> list[int]:
    """Run ``body(rank, folder)`` in ``world_size`` spawned processes; return their exit codes by rank."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    processes: list[Any] = [
        context.Process(target=_enter, args=(body, rank, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode) for process in processes]


def meet(folder: Path, name: str, rank: int, world_size: int = 2, *, stall_timeout_s: float = 60) -> Ranks:
    """Return the connected ranks that meet under ``name`` in ``folder``."""
    return connect(
        rank=rank,
        world_size=world_size,
        stall_timeout_s=stall_timeout_s,
        device=torch.device("cpu"),
        rendezvous_url=f"file://{folder / f'{name}.store'}",
    )


def _enter(body: RankBody, rank: int, folder: Path) -> None:
    fix_arithmetic(1, is_cpu=True)
    body(rank, folder)
