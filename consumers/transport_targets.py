"""Target bins for the coordinates of matched predictions, by optimal transport where a polygon takes part.

Owns section 6 of the method; it must not know tokens, losses or how the pairs came about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from broker_schemas.method.coordinates import LARGEST_BIN
from consumers.annealed_transport import START_SHARE, annealed_images, annealed_log_images, num_stages
from consumers.boundaries import Boundary, boundaries_of
from consumers.shapes import Shape
from consumers.sinkhorn import barycentric_images

Cost = Literal["l2_squared", "l2", "l1"]
COSTS: Final[tuple[Cost, ...]] = ("l2_squared", "l2", "l1")

# At two blur lengths exp(-2) of a vertex's image is still its neighbour's: that keeps corners within a bin.
CLEARANCE_BLURS = 2.0
# Squared spacings: a wider blur would mix a vertex with its neighbours, and jagged shapes would shrink.
BLUR_SHARE: Final = 0.05
SMALLEST_BLUR: Final = 1e-3
# Mean squared radii: below that blur the stages would be many, and its images lie closer than a bin anyway.
FLOOR_SHARE: Final = 5e-5
# Mean spacings that a vertex of the truth owns on either side for a predicted box: one of the box's points
# then lies wholly inside what the vertex takes and lands on it, and the extent is not cut at the corners.
CORNER_SPACINGS: Final = 2.0
# Cost matrices of 16 pairs of 64 x 64 points stay in a core's cache; more at once are slower for each.
BATCH_PAIRS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportSettings:
    """How boundaries are transported.

    ``ot_points``: points on each boundary. ``ot_cost``: ``l2_squared`` between centred boundaries, or the
    plain ``l2`` (Euclidean) or ``l1`` distance. ``ot_epsilon``: entropic blur in the unit of the cost, above
    0; with ``l2_squared`` it is reached from wider ones, and less is used where points lie closer.
    ``ot_iters``: most Sinkhorn iterations. Raises ValueError for a value that is out of range.
    """

    ot_points: int
    ot_epsilon: float
    ot_iters: int
    ot_cost: Cost

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
                f"transport settings, ot_epsilon: got {epsilon!r}, expected a number from 0.001 to 1e6"
            )
        if self.ot_cost not in COSTS:
            raise ValueError(
                f"transport settings, ot_cost: got {self.ot_cost!r}, expected {', '.join(COSTS)}"
            )


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
    moving: list[int] = []
    for index, (prediction, truth) in enumerate(pairs):
        if prediction.geometry == truth.geometry == "bbox_2d":
            targets[index] = list(truth.bins)
        else:
            moving.append(index)
    boundaries = _boundaries([pairs[index] for index in moving], settings)
    jobs = [
        _Job.of(index, boundaries[2 * k], boundaries[2 * k + 1], settings) for k, index in enumerate(moving)
    ]
    for batch in _batches(jobs):
        for job, image in zip(batch, _transport(batch, settings), strict=True):
            is_box = pairs[job.index][0].geometry == "bbox_2d"
            rows = job.source.vertex_rows
            moved = np.concatenate([image.min(axis=0), image.max(axis=0)]) if is_box else image[rows].ravel()
            targets[job.index] = _as_bins(moved)
    return targets


def _boundaries(pairs: Sequence[tuple[Shape, Shape]], settings: TransportSettings) -> list[Boundary]:
    """Return the boundaries of prediction, truth, prediction, truth and so on."""
    shapes = [shape for pair in pairs for shape in pair]
    if settings.ot_cost != "l2_squared":
        return boundaries_of(shapes, settings.ot_points, CLEARANCE_BLURS * settings.ot_epsilon)
    corners = [CORNER_SPACINGS if prediction.geometry == "bbox_2d" else 0.0 for prediction, _ in pairs]
    spacings = [value for corner in corners for value in (0.0, corner)]
    return boundaries_of(shapes, settings.ot_points, clear_spacings=spacings)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One pair to transport; ``start`` and ``epsilon`` are its first and last blur in squared bins."""

    index: int
    source: Boundary
    sink: Boundary
    start: float
    epsilon: float

    @classmethod
    def of(cls, index: int, source: Boundary, sink: Boundary, settings: TransportSettings) -> _Job:
        radius = math.sqrt(source.squared_radius * sink.squared_radius)
        spacing = min(source.spacing, sink.spacing)
        epsilon = min(settings.ot_epsilon, max(BLUR_SHARE * spacing**2, FLOOR_SHARE * radius, SMALLEST_BLUR))
        start = max(START_SHARE * radius, epsilon)
        return cls(index=index, source=source, sink=sink, start=start, epsilon=epsilon)


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Yield jobs whose arrays have one shape and whose annealing has one length."""
    alike: dict[tuple[int, int, int], list[_Job]] = defaultdict(list)
    for job in jobs:
        stages = num_stages(job.start, job.epsilon)
        alike[len(job.source.mass), len(job.sink.mass), stages].append(job)
    for same in alike.values():
        for start in range(0, len(same), BATCH_PAIRS):
            yield same[start : start + BATCH_PAIRS]


def _transport(batch: Sequence[_Job], settings: TransportSettings) -> NDArray[np.float64]:
    """Return the images (B, N, 2) of the points of the sources."""
    points = np.stack([job.source.points for job in batch])
    others = np.stack([job.sink.points for job in batch])
    masses = np.stack([job.source.mass for job in batch]), np.stack([job.sink.mass for job in batch])
    if settings.ot_cost == "l2_squared":
        start, epsilon = (np.array([getattr(job, name) for job in batch]) for name in ("start", "epsilon"))
        images = annealed_images(points, others, masses, start, epsilon, settings.ot_iters)
        lost = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2)))
        if len(lost):
            some = points[lost], others[lost], (masses[0][lost], masses[1][lost])
            images[lost] = annealed_log_images(*some, start[lost], epsilon[lost], settings.ot_iters)
        return images
    across, down = (points[:, :, None, axis] - others[:, None, :, axis] for axis in (0, 1))
    cost = np.abs(across) + np.abs(down) if settings.ot_cost == "l1" else np.sqrt(across**2 + down**2)
    return barycentric_images(cost, *masses, others, settings.ot_epsilon, settings.ot_iters)


def _as_bins(values: NDArray[np.float64]) -> list[int] | None:
    if not np.isfinite(values).all():
        return None
    bins: list[int] = np.clip(np.rint(values), 0, LARGEST_BIN).astype(np.int64).tolist()
    return bins
