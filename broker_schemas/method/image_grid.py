"""The patch grid that a model's image processor gives a picture, from its size alone.

Reads ``preprocessor_config.json`` and loads no library, so that thousands of pictures are looked at in a
moment; equality with the processor is tested.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.processor_file import stored_bounds
from broker_schemas.method.prompt import GridTHW

LARGEST_RATIO: Final = 200


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Patch edge, merge edge and bounds in pixels (width x height) of one model's pictures."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of_model(
        cls, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageGrid:
        """Read the processor's file in ``folder``; given bounds stand above its own. Raises DataError."""
        path = folder / "preprocessor_config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise DataError(f"{path}: not readable ({exc}); download the checkpoint again") from exc
        try:
            own = stored_bounds(content)
            grid = cls(
                patch_size=int(content.get("patch_size", 14)),
                merge_size=int(content.get("merge_size", 2)),
                min_pixels=min_pixels or _or_default(own.min_pixels, 56 * 56),
                max_pixels=max_pixels or _or_default(own.max_pixels, 28 * 28 * 1280),
            )
        except (AttributeError, TypeError, ValueError) as exc:
            raise DataError(f"{path}: not an image processor file ({exc}); download it again") from exc
        if not 1 <= grid.min_pixels <= grid.max_pixels or grid.patch_size < 1 or grid.merge_size < 1:
            raise DataError(
                f"{path}: got min_pixels {grid.min_pixels}, max_pixels {grid.max_pixels}, patches of "
                f"{grid.patch_size} and {grid.merge_size} merged, expected 1 <= min_pixels <= max_pixels; "
                "correct model.image, or download the checkpoint again"
            )
        return grid

    def grid(self, width: int, height: int) -> GridTHW:
        """Return (frames, rows, columns) of patches; raises DataError for a shape that no processor takes."""
        if max(width, height) > LARGEST_RATIO * min(width, height):
            raise DataError(
                f"image of {width}x{height} pixels: one side is more than {LARGEST_RATIO} times the other, "
                "which no processor takes; crop it or leave it out"
            )
        factor = self.patch_size * self.merge_size
        # a side may round to nothing here: the product is then under any bound and is scaled up
        rows, columns = (round(side / factor) * factor for side in (height, width))
        if rows * columns > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = (
                max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)
            )
        elif rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
        return 1, rows // self.patch_size, columns // self.patch_size

    def num_tokens(self, width: int, height: int) -> int:
        """Return the image tokens of a picture; raises DataError."""
        _, rows, columns = self.grid(width, height)
        return rows * columns // self.merge_size**2


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value
