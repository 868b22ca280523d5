"""Turns the examples of two evaluations into pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, UnidentifiedImageError

from rollstream.show.drawing import draw_shapes
from rollstream.show.report.data import Evaluation, Example
from rollstream.show.visible_text import one_line, visible_text

SHOWN_TEXT_CHARS: Final = 4000


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One example of one evaluation: ``picture`` is a data address, empty where ``problem`` says why."""

    label: str
    picture: str
    problem: str
    alt: str
    remark: str
    rollout_text: str


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """One image with a panel for each compared evaluation."""

    sample_id: str
    panels: tuple[Panel, ...]


def example_rows(compared: Sequence[Evaluation], *, largest_num: int = 3) -> list[ExampleRow]:
    """Return the first images that every compared evaluation has, else the first of any.

    They are the first ones of the file, not the best ones.
    """
    ids: list[str] = []
    for item in compared:
        ids += [sample_id for sample_id in item.examples if sample_id not in ids]
    shared = [sample_id for sample_id in ids if all(sample_id in item.examples for item in compared)]
    return [
        ExampleRow(
            sample_id=one_line(sample_id, 80),
            panels=tuple(
                _panel(item.label, item.examples[sample_id])
                for item in compared
                if sample_id in item.examples
            ),
        )
        for sample_id in (shared or ids)[:largest_num]
    ]


def picture_address(example: Example) -> str:
    """Return the drawn image as a ``data:`` address; raises OSError when no path can be opened."""
    problem: Exception = FileNotFoundError("no path is given")
    for path in example.image_paths:
        try:
            with Image.open(Path(path)) as image:
                drawn = draw_shapes(image, ground_truth=example.ground_truth, predictions=example.predictions)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as exc:
            problem = exc
            continue
        return _data_address(drawn)
    raise OSError(str(problem))


def _panel(label: str, example: Example) -> Panel:
    picture, problem = "", ""
    try:
        picture = picture_address(example)
    except OSError as exc:
        problem = f"the image cannot be shown: {one_line(str(exc), 200)}"
    wrote = f"{len(example.predictions)} written, {len(example.ground_truth)} labelled"
    notes = [
        wrote,
        "not a valid rollout" if example.is_invalid else "",
        "cut off" if example.truncated else "",
        f"{example.num_undrawable} not drawable" if example.num_undrawable else "",
    ]
    text = visible_text(example.rollout_text)
    if len(text) > SHOWN_TEXT_CHARS:
        text = f"{text[:SHOWN_TEXT_CHARS]}… ({len(text) - SHOWN_TEXT_CHARS} more characters)"
    described = ", ".join(one_line(shape.label, 24) for shape in example.predictions[:8]) or "no objects"
    return Panel(
        label=one_line(label, 24),
        picture=picture,
        problem=problem,
        alt=one_line(f"{example.sample_id}, {label}: {wrote}; the rollout lists {described}", 400),
        remark=", ".join(note for note in notes if note),
        rollout_text=text,
    )


def _data_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
