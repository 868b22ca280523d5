"""Entropic optimal transport between weighted point sets, for a whole batch at once.

Owns the iteration; it must not know shapes or bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Batch = NDArray[np.float64]

# Scalings are folded back into the potentials beyond this. A kernel entry lost to underflow is below 1e-300
# of its row, so it stays lost below 1e-100 of the row's mass: far under what a float64 can hold.
_LARGEST_SCALING = 1e100


def barycentric_images(
    cost: Batch,
    row_mass: Batch,
    column_mass: Batch,
    column_points: Batch,
    epsilon: float,
    num_iterations: int,
) -> Batch:
    """Return where transport sends each row: the mean of ``column_points`` under its row of the plan.

    ``cost`` (B, N, M) and ``epsilon`` in the same unit, ``row_mass`` (B, N) and ``column_mass`` (B, M)
    positive of sum 1, ``column_points`` (B, M, D); returns (B, N, D). One iteration scales the rows, then
    the columns. The potentials are kept as logarithms, so no cost is too large for the kernel (Cuturi 2013
    in the stabilised form of Schmitzer 2019, section 3.1).
    """
    scaled = cost / epsilon
    columns = _column_potentials(scaled, np.log(row_mass), np.log(column_mass), num_iterations)
    logits = columns[:, None, :] - scaled
    logits -= logits.max(axis=2, keepdims=True)
    plan = np.exp(logits)
    images: Batch = plan @ column_points / plan.sum(axis=2)[:, :, None]
    return images


def _column_potentials(scaled: Batch, log_rows: Batch, log_columns: Batch, num_iterations: int) -> Batch:
    """Return the log scalings (B, M) of the columns after the iterations, starting from all columns alike."""
    rows = log_rows - _log_sum_exp(log_columns[:, None, :] - scaled, axis=2)
    columns = log_columns - _log_sum_exp(rows[:, :, None] - scaled, axis=1)
    done = 1
    while done < num_iterations:
        kernel = np.exp(rows[:, :, None] + columns[:, None, :] - scaled)
        row_scale, column_scale, passed = _scale(kernel, log_rows, log_columns, num_iterations - done)
        if passed:
            rows, columns = rows + np.log(row_scale), columns + np.log(column_scale)
            done += passed
        else:
            rows = log_rows - _log_sum_exp(columns[:, None, :] - scaled, axis=2)
            columns = log_columns - _log_sum_exp(rows[:, :, None] - scaled, axis=1)
            done += 1
    return columns


def _scale(kernel: Batch, log_rows: Batch, log_columns: Batch, limit: int) -> tuple[Batch, Batch, int]:
    """Scale rows and columns up to ``limit`` times, and stop before a scaling leaves the safe range.

    Returns the scalings (B, N) and (B, M) and how many iterations they stand for.
    """
    row_mass, column_mass = np.exp(log_rows)[:, :, None], np.exp(log_columns)[:, :, None]
    transposed = np.ascontiguousarray(kernel.transpose(0, 2, 1))
    row_scale, column_scale = np.ones_like(row_mass), np.ones_like(column_mass)
    for passed in range(limit):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            next_rows = row_mass / (kernel @ column_scale)
            next_columns = column_mass / (transposed @ next_rows)
        if not (_is_safe(next_rows) and _is_safe(next_columns)):
            return row_scale[:, :, 0], column_scale[:, :, 0], passed
        row_scale, column_scale = next_rows, next_columns
    return row_scale[:, :, 0], column_scale[:, :, 0], limit


def _is_safe(scale: Batch) -> bool:
    # Written so that NaN is not safe.
    return bool(scale.max() <= _LARGEST_SCALING and scale.min() >= 1.0 / _LARGEST_SCALING)


def _log_sum_exp(values: Batch, axis: int) -> Batch:
    largest = values.max(axis=axis, keepdims=True)
    summed: Batch = np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)
    return summed
