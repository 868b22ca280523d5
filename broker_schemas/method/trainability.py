"""Whether a sample can be trained and generated at all, told before anything starts.

Looks at lengths in tokens, at the shape that the image processor must take, at the header and the end of each
picture file, and at labels. It decides nothing about the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.images import UPRIGHT, stored_orientation
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import PromptBuilder

Reason = Literal[
    "too_long", "image_shape", "unreadable_image", "size_differs", "turned_image", "control_token"
]
REASONS: Final[dict[Reason, str]] = {
    "too_long": "longer than a packed row",
    "image_shape": "a shape of image that no processor takes",
    "unreadable_image": "an image that cannot be read",
    "size_differs": "width and height are not those of the image",
    "turned_image": "an image that EXIF turns, seen lying on its side",
    "control_token": "a control token of the tokenizer in desc",
}
_COORDINATE: Final = re.compile(r"<\|coord_[0-9]{1,3}\|>")
_NUM_THREADS: Final = 8
_PART_SAMPLES: Final = 64
_TAIL_BYTES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class SampleProblem:
    """One sample that cannot be used, and why: ``reason`` to count, ``detail`` to read."""

    sample_id: str
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.sample_id}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class SampleLength:
    """Tokens of one sample: ``prompt`` with its image, ``payload`` with the end token."""

    sample_id: str
    prompt: int
    payload: int

    @property
    def total(self) -> int:
        return self.prompt + self.payload


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What was found in one data set: a problem a sample at most, lengths of those that have one."""

    num_samples: int
    problems: tuple[SampleProblem, ...]
    lengths: tuple[SampleLength, ...]

    @property
    def longest(self) -> SampleLength | None:
        """The sample with the most tokens in all; None for none."""
        return max(self.lengths, key=lambda length: length.total, default=None)

    @property
    def longest_payload(self) -> int:
        return max((length.payload for length in self.lengths), default=0)

    @property
    def longest_prompt(self) -> int:
        return max((length.prompt for length in self.lengths), default=0)


class SampleRuler:
    """Measures samples in the tokens of one model; texts between coordinates are encoded once.

    Coordinate tokens are added tokens, at which the tokenizer splits before anything else, so the count of
    the whole is the sum of its pieces.
    """

    def __init__(self, prompts: PromptBuilder, grid: ImageGrid) -> None:
        self._prompts = prompts
        self._grid = grid
        self._num_by_text: dict[str, int] = {}
        self._control_by_desc: dict[str, str | None] = {}
        coordinates = set(prompts.coord_vocab.bin_by_id)
        added: dict[int, Any] = prompts.tokenizer.get_added_tokens_decoder()
        self._control = {
            number: token.content
            for number, token in added.items()
            if token.special and number not in coordinates
        }

    def length(self, sample: Sample) -> SampleLength:
        """Return the tokens of ``sample``; raises DataError for an image shape that no processor takes."""
        grids = [self._grid.grid(sample.width, sample.height)] * len(sample.image_paths)
        text = render_payload(sample.objects).text
        num_coordinates = len(_COORDINATE.findall(text))
        num_text = sum(self._num_tokens(piece) for piece in _COORDINATE.split(text) if piece)
        return SampleLength(
            sample_id=sample.sample_id,
            prompt=len(self._prompts.build_ids(grids)),
            payload=num_coordinates + num_text + 1,
        )

    def control_token(self, sample: Sample) -> str | None:
        """Return the first control token that a ``desc`` of ``sample`` would become; None for none."""
        for item in sample.objects:
            if item.desc not in self._control_by_desc:
                ids = self._prompts.tokenizer.encode(item.desc, add_special_tokens=False).ids
                found = next((self._control[number] for number in ids if number in self._control), None)
                self._control_by_desc[item.desc] = found
            if self._control_by_desc[item.desc] is not None:
                return self._control_by_desc[item.desc]
        return None

    def _num_tokens(self, text: str) -> int:
        if text not in self._num_by_text:
            ids = self._prompts.tokenizer.encode(text, add_special_tokens=False).ids
            self._num_by_text[text] = len(ids)
        return self._num_by_text[text]


def examine_samples(
    samples: Sequence[Sample],
    ruler: SampleRuler | None,
    *,
    max_length: int | None,
    is_thorough: bool = False,
) -> SampleReport:
    """Return the first problem of each sample and the lengths of all that have one.

    ``ruler`` None: no model, so that pictures alone are looked at. ``max_length`` None: length is no matter,
    as for evaluation. ``is_thorough`` decodes every picture, else its header and the end of its file are
    looked at.
    """
    problems: dict[str, SampleProblem] = {}
    lengths: list[SampleLength] = []
    for sample in samples if ruler is not None else ():
        assert ruler is not None
        problem, length = _measure(sample, ruler, max_length)
        lengths += [length] if length is not None else []
        if problem is not None:
            problems.setdefault(sample.sample_id, problem)
    parts = [samples[start : start + _PART_SAMPLES] for start in range(0, len(samples), _PART_SAMPLES)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for found in pool.map(lambda some: _examine_some(some, is_thorough), parts):
            problems |= {problem.sample_id: problem for problem in found}
    ordered = tuple(problems[sample.sample_id] for sample in samples if sample.sample_id in problems)
    return SampleReport(num_samples=len(samples), problems=ordered, lengths=tuple(lengths))


def _examine_some(samples: Iterable[Sample], is_thorough: bool) -> list[SampleProblem]:
    found = (examine_pictures(sample, is_thorough=is_thorough) for sample in samples)
    return [problem for problem in found if problem is not None]


def _measure(
    sample: Sample, ruler: SampleRuler, max_length: int | None
) -> tuple[SampleProblem | None, SampleLength | None]:
    token = ruler.control_token(sample)
    if token is not None:
        detail = f"desc holds the control token {token}; write plain text"
        return SampleProblem(sample_id=sample.sample_id, reason="control_token", detail=detail), None
    try:
        length = ruler.length(sample)
    except DataError as exc:
        return SampleProblem(sample_id=sample.sample_id, reason="image_shape", detail=str(exc)), None
    if max_length is None or length.total <= max_length:
        return None, length
    detail = (
        f"{length.total} tokens (prompt and image {length.prompt}, {len(sample.objects)} objects "
        f"{length.payload}), training.global_max_length is {max_length}"
    )
    return SampleProblem(sample_id=sample.sample_id, reason="too_long", detail=detail), length


def examine_pictures(sample: Sample, *, is_thorough: bool) -> SampleProblem | None:
    """Return the first problem of the picture files of ``sample``; None where all can be shown."""
    for file in sample.image_files:
        found = _picture_problem(file, (sample.width, sample.height), is_thorough=is_thorough)
        if found is not None:
            return SampleProblem(sample_id=sample.sample_id, reason=found[0], detail=found[1])
    return None


def _picture_problem(
    file: Path, expected: tuple[int, int], *, is_thorough: bool
) -> tuple[Reason, str] | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            size, orientation, kind = stored.size, stored_orientation(stored), stored.format
            if is_thorough:
                stored.draft("RGB", (64, 64))
                stored.load()
        if not is_thorough and not _has_end(file, kind):
            return "unreadable_image", f"image {file} is cut off; copy it again"
    except FileNotFoundError:
        return "unreadable_image", f"image {file} does not exist; correct the path or copy it"
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as exc:
        return "unreadable_image", f"image {file} cannot be opened ({type(exc).__name__}: {exc})"
    if size != expected:
        stated = f"{expected[0]}x{expected[1]}"
        return "size_differs", f"image {file} has {size[0]}x{size[1]} pixels, the line says {stated}"
    if orientation != UPRIGHT:
        return (
            "turned_image",
            f"image {file} is stored turned (EXIF orientation {orientation}) and would be seen so; save it "
            "upright, or import the set again",
        )
    return None


def _has_end(file: Path, kind: str | None) -> bool:
    """Say whether a JPEG or PNG holds its end mark near the end; other kinds pass."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(str(kind))
    if mark is None:
        return True
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        return mark in stream.read()


def count_reasons(problems: Iterable[SampleProblem]) -> dict[Reason, int]:
    """Return how many samples each reason takes, in the order of REASONS; without those that take none."""
    found = [problem.reason for problem in problems]
    return {reason: found.count(reason) for reason in REASONS if reason in found}
