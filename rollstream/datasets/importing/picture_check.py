"""Opens a picture once: whether annotations fit it, how it must be turned or scaled, and puts it in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from broker_schemas.method.images import UPRIGHT, is_deep, stored_orientation, upright_eight_bit
from rollstream.datasets.importing.drafts import AnnotationProblem

_SIDEWAYS: Final = (5, 6, 7, 8)
_WRITABLE: Final = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One decoded picture: ``size`` (width, height) as shown upright, in pixels.

    ``orientation`` is the EXIF turn that was stored. ``are_points_stored``: its annotation counts pixels of
    the picture as stored, not as shown. ``is_deep``: it has more than 8 bits a channel.
    """

    size: tuple[int, int]
    orientation: int
    are_points_stored: bool
    is_deep: bool

    @property
    def is_turned(self) -> bool:
        return self.orientation != UPRIGHT


def examine_picture(source: Path | bytes, annotated: tuple[int, int] | None) -> Picture:
    """Decode the picture in ``source`` whole and return what it is.

    The ``annotated`` size tells whether points count pixels as stored or as shown; where it fits both, they
    are as shown, as the tools that annotate show them. Raises AnnotationProblem for a file that cannot be
    decoded, or whose size is the annotated one neither way.
    """
    from PIL import Image, UnidentifiedImageError

    name = "embedded image" if isinstance(source, bytes) else f"image {source}"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as stored:
            stored.load()
            size, orientation, deep = stored.size, stored_orientation(stored), is_deep(stored)
    except FileNotFoundError as exc:
        raise AnnotationProblem("no image", f"{name} does not exist") from exc
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        raise AnnotationProblem(
            "broken image", f"{name} cannot be opened ({type(exc).__name__}: {exc})"
        ) from exc
    shown = (size[1], size[0]) if orientation in _SIDEWAYS else size
    if annotated is not None and annotated not in (size, shown):
        raise AnnotationProblem(
            "size mismatch",
            f"{name} has {size[0]}x{size[1]} pixels, annotated as {annotated[0]}x{annotated[1]}",
        )
    is_stored = annotated is not None and annotated != shown
    return Picture(size=shown, orientation=orientation, are_points_stored=is_stored, is_deep=deep)


def turn_points(
    points: Sequence[float], orientation: int, shown: tuple[int, int], last: float
) -> tuple[float, ...]:
    """Return flat pixel ``points`` of a picture as stored where they lie when it is ``shown`` upright.

    ``last`` is 0 where points lie on pixel edges (0 to width), 1 where they are pixel centres (0 to
    width - 1). EXIF's eight orientations; another one turns nothing.
    """
    right, bottom = shown[0] - last, shown[1] - last
    turned: list[float] = []
    for x, y in zip(points[0::2], points[1::2], strict=True):
        turned += {
            2: (right - x, y),
            3: (right - x, bottom - y),
            4: (x, bottom - y),
            5: (y, x),
            6: (right - y, x),
            7: (right - y, bottom - x),
            8: (y, bottom - x),
        }.get(orientation, (x, y))
    return tuple(turned)


def turn_box(
    points: Sequence[float], orientation: int, shown: tuple[int, int], last: float
) -> tuple[float, ...]:
    """Return a turned box with its corners in order again."""
    x1, y1, x2, y2 = turn_points(points, orientation, shown, last)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def target_name(path: str, picture: Picture) -> str:
    """Return where the picture goes: a scaled one, or one whose kind cannot be written, becomes a PNG."""
    suffix = Path(path).suffix.lower()
    if not suffix:
        return f"{path}.png"
    if picture.is_deep or (picture.is_turned and suffix not in _WRITABLE):
        return f"{path[: -len(suffix)]}.png"
    return path


def place_picture(source: Path | bytes, target: Path, picture: Picture, *, is_linked: bool) -> None:
    """Write the picture to ``target``: as it is, or upright and in 8 bits; raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if picture.is_turned or picture.is_deep:
        _rewrite(source, target)
        return
    if isinstance(source, bytes):
        target.write_bytes(source)
        return
    if is_linked:
        try:
            os.link(source, target)
        except OSError:
            pass  # another file system, or one without hard links: a copy does the same
        else:
            return
    shutil.copyfile(source, target)


def _rewrite(source: Path | bytes, target: Path) -> None:
    from PIL import Image

    kind = _WRITABLE.get(target.suffix.lower(), "PNG")
    settings: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as stored:
        upright_eight_bit(stored).save(target, format=kind, **settings)
