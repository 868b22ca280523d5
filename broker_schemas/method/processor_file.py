"""The image bounds in a model folder's processor files, read and written as transformers takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError

PROCESSOR_FILE: Final = "preprocessor_config.json"
# newer libraries write one file for all modalities; where it holds the images' part, that part counts
JOINT_FILE: Final = "processor_config.json"
JOINT_PART: Final = "image_processor"
_MOST, _FEWEST = ("max_pixels", "longest_edge"), ("min_pixels", "shortest_edge")


@dataclass(frozen=True, kw_only=True)
class ImageBounds:
    """Fewest and most pixels (width x height) of a resized image; None: as the file says."""

    min_pixels: int | None
    max_pixels: int | None


def stored_bounds(content: Mapping[str, Any]) -> ImageBounds:
    """Return the bounds in the content of a processor's file; ``min_pixels`` stands above ``size``.

    Raises AttributeError, TypeError or ValueError for content of another shape.
    """
    fewest, most = (_stored(content, *names) for names in (_FEWEST, _MOST))
    return ImageBounds(min_pixels=fewest, max_pixels=most)


def write_image_bounds(folder: Path, bounds: ImageBounds) -> None:
    """Write ``bounds`` into the processor files of ``folder``; what they leave open stays as it is.

    Raises DataError for a file that describes no image processor.
    """
    if bounds.min_pixels is None and bounds.max_pixels is None:
        return
    for name in (PROCESSOR_FILE, JOINT_FILE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            part = content if name == PROCESSOR_FILE else content.get(JOINT_PART)
            if part is not None:
                _set_bounds(part, bounds)
        except (AttributeError, TypeError, ValueError, RecursionError) as exc:
            raise DataError(f"{path}: not an image processor file ({exc}); download it again") from exc
        if part is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stored(content: Mapping[str, Any], name: str, edge: str) -> int | None:
    size = content.get("size") or {}
    value = content.get(name, size.get(edge, size.get(name)))
    return None if value is None else int(value)


def _set_bounds(content: dict[str, Any], bounds: ImageBounds) -> None:
    own = stored_bounds(content)
    wanted = (bounds.min_pixels or own.min_pixels, bounds.max_pixels or own.max_pixels)
    size = dict(content.get("size") or {})
    for (name, edge), value in zip((_FEWEST, _MOST), wanted, strict=True):
        content.pop(name, None)
        size.pop(name, None)
        if value is not None:
            size[edge] = value
    content["size"] = size
