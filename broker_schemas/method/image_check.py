"""Whether an image file can be what a record says: what the learner will open, decoded once a file.

The matcher judges with it before it admits a rollout. No torch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.images import confine_image_path, decoded_size
from broker_schemas.records.records import ImageReference

SIZES_KEPT: Final = 16_384


@dataclass
class ImageCheck:
    """Says whether the learner can open what a record names, below ``root`` and cut by ``rule``."""

    root: Path
    rule: ImageGrid | None
    _sizes: OrderedDict[tuple[str, int, int], tuple[int, int]] = field(
        default_factory=OrderedDict, init=False
    )

    def problem(self, image: ImageReference) -> str | None:
        """Return what is wrong with ``image``, None for nothing."""
        try:
            file = confine_image_path(self.root, image.path)
            size = self._size_of(file)
            grid = self.rule.grid(*size) if self.rule is not None else image.grid_thw
        except (DataError, OSError, ValueError) as exc:
            return str(exc)
        if size != (image.width, image.height):
            return f"image {file}: got {size[0]}x{size[1]} pixels, expected {image.width}x{image.height}"
        if grid != image.grid_thw:
            return f"image {file}: got grid {image.grid_thw}, expected {grid} by our image processor"
        return None

    def _size_of(self, file: Path) -> tuple[int, int]:
        facts = file.stat()
        key = (str(file), facts.st_mtime_ns, facts.st_size)
        if key not in self._sizes:
            self._sizes[key] = decoded_size(file)
            if len(self._sizes) > SIZES_KEPT:
                self._sizes.popitem(last=False)
        return self._sizes[key]
