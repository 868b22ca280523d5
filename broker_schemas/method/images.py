"""Images on their way into the model: confined paths, opened files, pixel values and patch grids.

Every role that shows an image to a model does it here, so that all see the same pixels. PIL, torch and
transformers are imported on first use only.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.prompt import GridTHW

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

UPRIGHT: Final = 1
_ORIENTATION_TAG: Final = 0x0112
_DEEP_MODES: Final = ("I", "F")
DEFAULT_CACHE_BYTES: Final = 256 * 1024 * 1024
PROCESSOR_SETTINGS: Final = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
    "temporal_patch_size",
)


def absolute_root(root: str | Path) -> Path:
    """Return ``root`` as an absolute path without ``..``; links stay as they are."""
    return Path(os.path.abspath(root))


def confine_image_path(root: Path, path: str | Path, *, relative_to: Path | None = None) -> Path:
    """Return the absolute file that ``path`` names, read from ``relative_to`` (default ``root``).

    Raises DataError when it lies outside ``root``. Links inside ``root`` are followed: whoever owns the data
    root placed them; ``..`` is taken away before the file system sees it.
    """
    base = str(absolute_root(root))
    file = os.path.abspath(os.path.join(relative_to or root, path))
    if "\0" in str(path) or os.path.commonpath([base, file]) != base or file == base:
        raise DataError(f"image path {str(path)!r}: leaves the data root {base}; keep images inside it")
    return Path(file)


def open_image(file: Path) -> Image:
    """Return the decoded RGB image in ``file``, more than 8 bits scaled; raises DataError that names it.

    It is not turned: labels count pixels as they are stored.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            return _eight_bit_rgb(stored)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise _cannot_open(file, exc) from exc


def read_image_size(file: Path) -> tuple[int, int]:
    """Return (width, height) in pixels from the header of ``file``; raises DataError that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            return stored.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise _cannot_open(file, exc) from exc


def decoded_size(file: Path) -> tuple[int, int]:
    """Return (width, height) in pixels of ``file``, its pixels tried; raises DataError that names it.

    A JPEG is decoded at an eighth of its size: its whole stream is read, most of the arithmetic is not done.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            size = stored.size
            stored.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
            stored.load()
            return size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise _cannot_open(file, exc) from exc


def open_upright(file: Path) -> Image:
    """Return the decoded RGB image in ``file`` as it is meant to be seen; errors as ``open_image``."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            return upright_eight_bit(stored)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise _cannot_open(file, exc) from exc


def stored_orientation(stored: Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 where it says nothing usable."""
    value = stored.getexif().get(_ORIENTATION_TAG, UPRIGHT)
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def is_deep(stored: Image) -> bool:
    """Say whether an opened image holds one channel of more than 8 bits."""
    return stored.mode in _DEEP_MODES or stored.mode.startswith("I;")


def upright_eight_bit(stored: Image) -> Image:
    """Return an opened image as RGB, turned as its EXIF orientation says, more than 8 bits scaled."""
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(stored) if stored_orientation(stored) != UPRIGHT else stored
    return _eight_bit_rgb(turned)


def _eight_bit_rgb(stored: Image) -> Image:
    """Return RGB; deep whole numbers are scaled by the depth that holds them, floats by their range."""
    from PIL import Image

    if not is_deep(stored):
        return stored.convert("RGB")
    import numpy as np

    values = np.nan_to_num(np.asarray(stored, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if stored.mode == "F" or low < 0:
        scaled = (values - low) / max(high - low, np.finfo(float).tiny)
    else:
        depth = next((bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits), 32)
        scaled = values / ((1 << depth) - 1)
    return Image.fromarray(np.rint(scaled * 255).astype(np.uint8)).convert("RGB")


def _cannot_open(file: Path, exc: Exception) -> DataError:
    if isinstance(exc, FileNotFoundError):
        return DataError(f"image {file}: does not exist; check the path in the data set")
    return DataError(
        f"image {file}: cannot be opened ({type(exc).__name__}: {exc}); "
        "replace the file or take it out of the data set"
    )


class ImageProcessor:
    """The image processor of one model folder, without torchvision.

    ``fingerprint`` is a short hash of every setting that changes pixel values or grids: equal fingerprints
    give equal tensors. Decoded pixel values are kept, least recently used out first, up to ``cache_bytes``
    (0 keeps none). Safe to share between threads.
    """

    def __init__(
        self,
        model_dir: str | Path,
        root: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.root = absolute_root(root)
        self._processor = _load_processor(Path(model_dir), min_pixels, max_pixels)
        self.merge_size = int(self._processor.merge_size)
        self.fingerprint = _fingerprint(self._processor)
        self._cache = _PixelCache(cache_bytes)

    def load(self, path: str | Path) -> tuple[torch.Tensor, GridTHW]:
        """Return (pixel_values, grid_thw) of the image at ``path``, relative to the data root.

        ``pixel_values`` is float32 (patches, channels x frames x patch area) and shared with later calls: do
        not change it. Raises DataError for a path outside the root or an image that cannot be opened.
        """
        file = confine_image_path(self.root, path)
        cached = self._cache.get(str(file))
        if cached is None:
            cached = self.process(open_image(file), name=str(file))
            self._cache.put(str(file), cached)
        return cached

    def process(self, image: Image, *, name: str = "image in memory") -> tuple[torch.Tensor, GridTHW]:
        """Return (pixel_values, grid_thw) of an RGB ``image``; ``name`` stands in errors (DataError)."""
        try:
            output = self._processor(images=[image], return_tensors="pt")
        except ValueError as exc:
            raise DataError(f"image {name}: {exc}; crop it or take it out of the data set") from exc
        frames, rows, columns = (int(size) for size in output["image_grid_thw"][0])
        return output["pixel_values"].float(), (frames, rows, columns)

    def resized(self, path: str | Path) -> tuple[Image, GridTHW]:
        """Return (RGB image at the size the model sees, grid_thw) of the image at ``path``.

        A processor with the same bounds leaves it as it is, so that another program sees the same pixels.
        Errors as ``load``.
        """
        from PIL import Image

        image = open_image(confine_image_path(self.root, path))
        grid = self.grid_for_size(*image.size)
        patch = int(self._processor.patch_size)
        size = (grid[2] * patch, grid[1] * patch)
        if image.size == size:
            return image, grid
        return image.resize(size, resample=Image.Resampling(int(self._processor.resample))), grid

    def grid_for_size(self, width: int, height: int) -> GridTHW:
        """Return the (frames, rows, columns) that an image of this size in pixels gets; raises DataError."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        patch, size = int(self._processor.patch_size), self._processor.size
        try:
            resized_height, resized_width = smart_resize(
                height,
                width,
                factor=patch * self.merge_size,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
        except ValueError as exc:
            raise DataError(f"image of {width}x{height} pixels: {exc}; crop it or leave it out") from exc
        return 1, resized_height // patch, resized_width // patch


class _PixelCache:
    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._entries: OrderedDict[str, tuple[torch.Tensor, GridTHW]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[torch.Tensor, GridTHW] | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: str, value: tuple[torch.Tensor, GridTHW]) -> None:
        with self._lock:
            if key in self._entries or value[0].nbytes > self._limit_bytes:
                return
            self._entries[key] = value
            self._held_bytes += value[0].nbytes
            while self._held_bytes > self._limit_bytes:
                _, (dropped, _) = self._entries.popitem(last=False)
                self._held_bytes -= dropped.nbytes


def _load_processor(folder: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no preprocessor_config.json, expected the folder of a Qwen vision-language model; "
            "download the checkpoint again, with all its files"
        )
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as exc:
        raise DataError(f"{path}: not an image processor file ({exc}); download it again") from exc
    size = dict(processor.size)
    size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
    size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
    if not 1 <= size["shortest_edge"] <= size["longest_edge"]:
        raise DataError(
            f"image bounds: got min_pixels {size['shortest_edge']} and max_pixels {size['longest_edge']}, "
            "expected 1 <= min_pixels <= max_pixels"
        )
    processor.size = size
    return processor


def _fingerprint(processor: Any) -> str:
    settings = {name: getattr(processor, name, None) for name in PROCESSOR_SETTINGS}
    settings["size"] = [processor.size["shortest_edge"], processor.size["longest_edge"]]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
