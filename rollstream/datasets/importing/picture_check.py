"""Opens a picture once and says whether its annotations can be trusted to fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rollstream.datasets.importing.drafts import AnnotationProblem

_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = 1


def picture_size(file: Path, annotated: tuple[int, int] | None) -> tuple[int, int]:
    """Return (width, height) of the picture in ``file`` in pixels, after decoding all of it.

    Raises AnnotationProblem for a file that cannot be decoded, whose size is not the ``annotated`` one, or
    that is stored turned: the model would see it otherwise than the annotator did.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            picture.load()
            size, orientation = picture.size, picture.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
    except FileNotFoundError as exc:
        raise AnnotationProblem("no image", f"image {file} does not exist") from exc
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise AnnotationProblem(
            "broken image", f"image {file} cannot be opened ({type(exc).__name__}: {exc})"
        ) from exc
    if orientation != _UPRIGHT:
        raise AnnotationProblem(
            "turned image",
            f"image {file} is stored turned (EXIF orientation {orientation}); save it upright, annotate that",
        )
    if annotated is not None and annotated != size:
        raise AnnotationProblem(
            "size mismatch",
            f"image {file} has {size[0]}x{size[1]} pixels, annotated as {annotated[0]}x{annotated[1]}",
        )
    return size
