"""Target bins for the coordinates of matched predictions, by optimal transport where a polygon takes part.

Owns section 6 of the method; it must not know tokens, losses or how the pairs came about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import LARGEST_BIN
from consumers.boundaries import Boundary, boundary_of
from consumers.shapes import Shape
from consumers.sinkhorn import barycentric_images

# At two blur lengths exp(-2) of a vertex's image is still its neighbour's: that keeps corners within a bin.
CLEARANCE_BLURS = 2.0
# Eight cost matrices of 64 x 64 stay in a core's cache; larger batches are slower for each pair.
BATCH_PAIRS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportSettings:
    """How boundaries are transported.

    ``ot_points``: points on each boundary. ``ot_epsilon``: entropic blur in bins, above 0. ``ot_iters``:
    Sinkhorn iterations. ``ot_cost``: ``l2`` (Euclidean) or ``l1`` distance in bins.
    Raises ValueError for a value that is out of range.
    """

    ot_points: int = 64
    ot_epsilon: float = 2.0
    ot_iters: int = 50
    ot_cost: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        for name, low, high in (("ot_points", 3, 1 << 12), ("ot_iters", 1, 1 << 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"transport settings, {name}: got {value!r}, expected a whole number from {low} to {high}"
                )
        epsilon = self.ot_epsilon
        is_number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
        if not is_number or not math.isfinite(epsilon) or not 1e-3 <= epsilon <= 1e6:
            raise ValueError(
                f"transport settings, ot_epsilon: got {epsilon!r} bins, expected a number from 0.001 to 1e6"
            )
        if self.ot_cost not in ("l2", "l1"):
            raise ValueError(f"transport settings, ot_cost: got {self.ot_cost!r}, expected l2 or l1")


class TargetNotBuilt(ValueError):
    """A pair has no target: transport gave a value that is not finite."""


def barycentric_targets(prediction: Shape, ground_truth: Shape, settings: TransportSettings) -> list[int]:
    """Return one target bin for each bin of ``prediction`` (ROLLOUT_MATCHING section 6).

    A box on a box takes the ground truth's bins. Otherwise a predicted polygon takes the images of its own
    vertices in order, a predicted box the extent (x1, y1, x2, y2) of the images of its boundary.
    Raises TargetNotBuilt.
    """
    (target,) = targets_of_pairs([(prediction, ground_truth)], settings)
    if target is None:
        raise TargetNotBuilt(
            f"transport: got a value that is not finite for {prediction.bins} on {ground_truth.bins}, "
            "expected target bins; raise ot_epsilon"
        )
    return target


def targets_of_pairs(
    pairs: Sequence[tuple[Shape, Shape]], settings: TransportSettings
) -> list[list[int] | None]:
    """Return ``barycentric_targets`` of each (prediction, ground truth), None where it cannot be built.

    Pairs with boundaries of the same size are transported in batches; no pairs give an empty list.
    """
    targets: list[list[int] | None] = [None] * len(pairs)
    by_size: dict[tuple[int, int], list[tuple[int, Boundary, Boundary]]] = defaultdict(list)
    for index, (prediction, truth) in enumerate(pairs):
        if prediction.geometry == truth.geometry == "bbox_2d":
            targets[index] = list(truth.bins)
            continue
        clearance = CLEARANCE_BLURS * settings.ot_epsilon
        source = boundary_of(prediction, settings.ot_points, clearance)
        sink = boundary_of(truth, settings.ot_points, clearance)
        by_size[len(source.mass), len(sink.mass)].append((index, source, sink))
    batches = [
        same_size[start : start + BATCH_PAIRS]
        for same_size in by_size.values()
        for start in range(0, len(same_size), BATCH_PAIRS)
    ]
    for batch in batches:
        images = _transport([source for _, source, _ in batch], [sink for _, _, sink in batch], settings)
        for (index, source, _), image in zip(batch, images, strict=True):
            is_box = pairs[index][0].geometry == "bbox_2d"
            moved = [*image.min(axis=0), *image.max(axis=0)] if is_box else image[source.vertex_rows].ravel()
            targets[index] = _as_bins(np.asarray(moved))
    return targets


def _transport(
    sources: Sequence[Boundary], sinks: Sequence[Boundary], settings: TransportSettings
) -> NDArray[np.float64]:
    """Return the images (B, N, 2) of the points of ``sources``; boundaries on a side have the same size."""
    points = np.stack([source.points for source in sources])
    others = np.stack([sink.points for sink in sinks])
    across, down = (points[:, :, None, axis] - others[:, None, :, axis] for axis in (0, 1))
    cost = np.abs(across) + np.abs(down) if settings.ot_cost == "l1" else np.sqrt(across**2 + down**2)
    return barycentric_images(
        cost,
        np.stack([source.mass for source in sources]),
        np.stack([sink.mass for sink in sinks]),
        others,
        settings.ot_epsilon,
        settings.ot_iters,
    )


def _as_bins(values: NDArray[np.float64]) -> list[int] | None:
    if not np.isfinite(values).all():
        return None
    bins: list[int] = np.clip(np.rint(values), 0, LARGEST_BIN).astype(np.int64).tolist()
    return bins
