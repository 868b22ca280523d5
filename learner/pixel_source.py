"""Pixels of the images that a rollout names, through the shared image processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from broker_schemas.method.images import ImageProcessor
from broker_schemas.records.records import ImageReference
from learner.collation import SegmentPixels


class ProcessorPixelSource:
    """Opens image references below the processor's data root; safe to call from a thread."""

    def __init__(self, images: ImageProcessor) -> None:
        self._images = images

    def load_pixels(self, images: Sequence[ImageReference]) -> SegmentPixels | None:
        """Return the pixels of ``images`` in order, None for none; raises DataError that names the image."""
        if not images:
            return None
        loaded = [self._images.load(image.path) for image in images]
        return SegmentPixels(
            patches=torch.cat([patches for patches, _ in loaded]),
            grids_thw=torch.tensor([grid for _, grid in loaded]),
        )
