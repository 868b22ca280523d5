"""A data set in the tokens of a model: how long its samples are, and which settings hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.method.trainability import SampleLength, SampleRuler
from configs.run_sections import ModelSection

LENGTH_STEP: Final = 64
ROLLOUT_HEADROOM: Final = 1.25
"""A rollout may name some objects more than there are."""
LARGEST_BOUND: Final = 1024 * 1024
"""Most pixels of a picture that are worth their tokens where the model's processor takes more."""


@dataclass(frozen=True, kw_only=True)
class DataMeasure:
    """What a data set needs of a model. Lengths are in tokens; sizes are pixels, width x height.

    ``max_new_tokens`` holds the longest list of objects with some headroom, ``global_max_length`` a sample
    whose rollout is that long and still needs every object appended. No processor takes the shape of
    ``too_wide`` samples.
    """

    num_samples: int
    num_objects: int
    most_objects: int
    largest_picture_pixels: int
    min_pixels: int
    max_pixels: int
    longest_prompt: int
    longest_payload: int
    mean_length: float
    longest: SampleLength
    too_wide: tuple[str, ...]

    @property
    def max_new_tokens(self) -> int:
        return rounded_up(ROLLOUT_HEADROOM * self.longest_payload)

    @property
    def global_max_length(self) -> int:
        return rounded_up(self.longest_prompt + self.max_new_tokens + self.longest_payload)


def rounded_up(length: float) -> int:
    """Return the next multiple of 64 tokens."""
    return -int(-length // LENGTH_STEP) * LENGTH_STEP


def measure_files(files: Sequence[Path], model_dir: Path) -> DataMeasure:
    """Measure data sets in the tokens of a model folder, with the default prompts of a configuration.

    The picture bounds are the processor's own, the upper one no more than the largest picture and
    LARGEST_BOUND. Raises DataError for a folder without coordinate tokens, or files without a usable sample.
    """
    samples = [sample for file in files for sample in read_dataset(file)]
    defaults = ModelSection.model_fields
    prompts = PromptBuilder(
        model_dir,
        system_prompt=str(defaults["system_prompt"].default),
        instruction=str(defaults["instruction"].default),
    )
    own = ImageGrid.of_model(model_dir)
    largest = max(sample.width * sample.height for sample in samples)
    step = (own.patch_size * own.merge_size) ** 2
    upper = max(own.min_pixels, min(own.max_pixels, LARGEST_BOUND, -(-largest // step) * step))
    grid = ImageGrid.of_model(model_dir, min_pixels=own.min_pixels, max_pixels=upper)
    lengths, too_wide = _lengths(samples, SampleRuler(prompts, grid))
    if not lengths:
        raise DataError(f"{files[0]}: no sample has a shape that a processor takes")
    return DataMeasure(
        num_samples=len(samples),
        num_objects=sum(len(sample.objects) for sample in samples),
        most_objects=max(len(sample.objects) for sample in samples),
        largest_picture_pixels=largest,
        min_pixels=own.min_pixels,
        max_pixels=upper,
        longest_prompt=max(length.prompt for length in lengths),
        longest_payload=max(length.payload for length in lengths),
        mean_length=sum(length.total for length in lengths) / len(lengths),
        longest=max(lengths, key=lambda length: length.total),
        too_wide=tuple(too_wide),
    )


def _lengths(samples: Sequence[Sample], ruler: SampleRuler) -> tuple[list[SampleLength], list[str]]:
    lengths, too_wide = [], []
    for sample in samples:
        try:
            lengths.append(ruler.length(sample))
        except DataError:
            too_wide.append(sample.sample_id)
    return lengths, too_wide
