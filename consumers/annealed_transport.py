"""Entropic optimal transport for the squared distance between centred point sets, annealed, in batches.

Owns the iteration and its schedule; it must not know shapes, bins or settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Batch = NDArray[np.float64]
Kernel = NDArray[Any]  # float32

# The first blur, in mean squared radii: wide enough that the first plan has the right large parts.
START_SHARE: Final = 0.2
# From one stage to the next epsilon falls at most by this: a kernel entry above its row's mass, at most
# exp(10) for masses of 1e-4, then stays below exp(80), which float32 holds.
LARGEST_FALL: Final = 8.0
MIN_STAGES: Final = 5
STAGE_ITERATIONS: Final = 3
# A pair has converged when no image moves further than this in one iteration, in the unit of the points.
TOLERANCE: Final = 1.0


def num_stages(start: float, epsilon: float) -> int:
    """Return how many stages lead from ``start`` down to ``epsilon``."""
    falls = math.log(max(start / epsilon, 1.0)) / math.log(LARGEST_FALL)
    return max(math.ceil(falls - 1e-9) + 1, MIN_STAGES)


def annealed_images(
    points: Batch,
    others: Batch,
    masses: tuple[Batch, Batch],
    start: Batch,
    epsilon: Batch,
    num_iterations: int,
) -> Batch:
    """Return where transport sends each of ``points`` (B, N, 2): the mean of ``others`` under its plan.

    ``others`` (B, M, 2); ``masses`` (B, N) and (B, M) are positive of sum 1; ``epsilon`` (B,) is the last
    blur in squared units, reached from ``start`` (B,) in stages (Kosowsky and Yuille 1994, of Sinkhorn's
    iteration as in Cuturi 2013), the same number for all of a batch. An early stage takes a few of
    ``num_iterations``, the last one goes on until the images of a pair stand still. Every pair gets what it
    would get alone. What float32 cannot hold gives NaN.
    """
    mass, other_mass = masses
    x, y = _centred(points, mass), _centred(others, other_mass)
    stages = num_stages(float(start[0]), float(epsilon[0]))
    early = min(STAGE_ITERATIONS, max(num_iterations // stages, 1))
    fall = (np.minimum(epsilon / start, 1.0)) ** (1.0 / (stages - 1))
    marginals = _Marginals.of(mass, other_mass)
    targets = y.astype(np.float32)
    # Potentials less the squared lengths of the points: the exponent is then one product of matrices.
    columns = -(y**2).sum(axis=2)
    rows = -_sums(2.0 * x, np.zeros_like(mass), y, columns).max(axis=2)
    with np.errstate(all="ignore"):
        for stage in range(stages - 1):
            blur = (start * fall**stage)[:, None]
            kernel = _kernel(x, rows, y, columns, blur)
            scale, row_sums = marginals.column_scales(kernel, early)
            columns = columns + blur * np.log(scale[:, :, 0] / marginals.columns[:, :, 0])
            rows = rows - blur * np.log(row_sums[:, :, 0])
        kernel = _kernel(x, rows, y, columns, epsilon[:, None])
        left = max(num_iterations - early * (stages - 1), 1)
        images: Batch = marginals.converged_images(kernel, targets, left).astype(np.float64)
    return images + (others - y)[:, :1]


def annealed_log_images(
    points: Batch,
    others: Batch,
    masses: tuple[Batch, Batch],
    start: Batch,
    epsilon: Batch,
    num_iterations: int,
) -> Batch:
    """Return what ``annealed_images`` returns, by logarithms in float64: ten times slower, for any blur."""
    x, y = _centred(points, masses[0]), _centred(others, masses[1])
    log_rows, log_columns = (np.log(mass) for mass in masses)
    stages = num_stages(float(start[0]), float(epsilon[0]))
    fall = (np.minimum(epsilon / start, 1.0)) ** (1.0 / (stages - 1))
    cost = ((x[:, :, None, :] - y[:, None, :, :]) ** 2).sum(axis=3)
    columns = np.zeros_like(masses[1])
    for stage in range(stages):
        blur = np.maximum(start * fall**stage, epsilon)[:, None]
        scaled = cost / blur[:, :, None]
        for _ in range(min(STAGE_ITERATIONS, max(num_iterations // stages, 1))):
            weighted = (columns / blur + log_columns)[:, None, :] - scaled
            rows = -blur * _log_sum_exp(weighted, axis=2)
            columns = -blur * _log_sum_exp((rows / blur + log_rows)[:, :, None] - scaled, axis=1)
    plan = (columns / blur + log_columns)[:, None, :] - scaled
    plan = np.exp(plan - plan.max(axis=2, keepdims=True))
    images: Batch = plan @ others / plan.sum(axis=2, keepdims=True)
    return images


def _log_sum_exp(values: Batch, axis: int) -> Batch:
    largest = values.max(axis=axis, keepdims=True)
    summed: Batch = np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)
    return summed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Marginals:
    """Masses of the rows (B, N, 1) and of the columns (B, M, 1)."""

    rows: Kernel
    columns: Kernel

    @classmethod
    def of(cls, mass: Batch, other_mass: Batch) -> _Marginals:
        rows, columns = (values.astype(np.float32)[:, :, None] for values in (mass, other_mass))
        return cls(rows=rows, columns=columns)

    def column_scales(self, kernel: Kernel, num_iterations: int) -> tuple[Kernel, Kernel]:
        """Scale rows, then columns; return the scales of the columns and the sums of the rows under them."""
        scale, row_sums = self.columns, kernel @ self.columns
        for _ in range(num_iterations):
            scale, row_sums = self._next(kernel, row_sums)
        return scale, row_sums

    def converged_images(self, kernel: Kernel, targets: Kernel, limit: int) -> Kernel:
        """Return the images (B, N, 2) once they stand still, at the latest after ``limit`` iterations."""
        scale, row_sums = self._next(kernel, kernel @ self.columns)
        images: Kernel = kernel @ (scale * targets) / row_sums
        moving = np.ones((len(kernel), 1, 1), dtype=np.bool_)
        for _ in range(limit - 1):
            scale, row_sums = self._next(kernel, row_sums)
            moved = kernel @ (scale * targets) / row_sums
            apart = np.abs(moved - images).max(axis=(1, 2), keepdims=True)
            images = np.where(moving, moved, images)
            moving = moving & (apart > TOLERANCE)
            if not moving.any():
                break
        return images

    def _next(self, kernel: Kernel, row_sums: Kernel) -> tuple[Kernel, Kernel]:
        scale: Kernel = self.columns / (kernel.transpose(0, 2, 1) @ (self.rows / row_sums))
        return scale, kernel @ scale


def _kernel(x: Batch, rows: Batch, y: Batch, columns: Batch, blur: Batch) -> Kernel:
    exponent = _sums(x * (2.0 / blur)[:, :, None], rows / blur, y, columns / blur)
    kernel: Kernel = np.exp(exponent.astype(np.float32))
    return kernel


def _sums(x: Batch, row_terms: Batch, y: Batch, column_terms: Batch) -> Batch:
    """Return (B, N, M): the inner products of ``x`` and ``y``, each with its row's and its column's term."""
    left = np.concatenate([x, row_terms[:, :, None], np.ones_like(row_terms)[:, :, None]], axis=2)
    right = np.concatenate([y, np.ones_like(column_terms)[:, :, None], column_terms[:, :, None]], axis=2)
    sums: Batch = left @ right.transpose(0, 2, 1)
    return sums


def _centred(points: Batch, mass: Batch) -> Batch:
    centred: Batch = points - mass[:, None, :] @ points
    return centred
