"""A data set that works on any machine: scenes composed of scikit-learn's scanned handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from broker_schemas.errors import DataError
from broker_schemas.records.records import GroundTruthObject
from rollstream.datasets.digit_outline import DigitShape, digit_shape
from rollstream.datasets.importing.writer import DraftSample, write_split
from rollstream.datasets.scene_drawing import SceneSettings, draw_scene
from rollstream.staged_folder import staged_folder

MAKER: Final = "data scenes"
VALIDATION_SHARE: Final = 0.2
SPLITS: Final = ("train", "val")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ScenesSummary:
    """What was written: the folder, scenes and objects in both splits, polygons among the objects."""

    folder: Path
    num_train: int
    num_val: int
    num_objects: int
    num_polygons: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.num_train} training and {self.num_val} validation scenes, "
            f"{self.num_objects} objects, {self.num_polygons} of them polygons"
        )


def make_scenes(
    destination: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 128,
    seed: int = 0,
    image_size: int = 128,
    polygon_share: float = 0.25,
    progress: Progress | None = None,
) -> ScenesSummary:
    """Write train.jsonl, val.jsonl and images/ whole under ``destination``.

    Train and validation never show the same scan. A scene depends on ``seed``, its split and its number
    alone, so a larger set begins with a smaller one. A folder that this function made is replaced; any other
    that is not empty, or arguments out of range, raise DataError. ``progress`` gets (done, total) scenes.
    """
    _check_arguments(num_train, num_val, image_size, polygon_share)
    arguments = {"num_train": num_train, "num_val": num_val, "seed": seed, "image_size": image_size}
    settings = SceneSettings(
        image_side_pixels=image_size,
        smallest_digit_pixels=round(image_size * 24 / 128),
        largest_digit_pixels=round(image_size * 56 / 128),
        polygon_share=polygon_share,
    )
    counts = {"train": num_train, "val": num_val}
    folder = Path(destination)
    objects: list[GroundTruthObject] = []
    with staged_folder(folder, MAKER, {**arguments, "scene": asdict(settings)}) as staging:
        (staging / "images").mkdir()
        shapes = dict(zip(SPLITS, split_shapes(seed), strict=True))
        done = 0
        for split_number, split in enumerate(SPLITS):
            samples = []
            for number in range(counts[split]):
                generator = np.random.default_rng([seed, split_number, number])
                name = f"{split}-{number:05d}"
                samples.append(_write_scene(staging, name, shapes[split], settings, generator))
                done += 1
                if progress:
                    progress(done, num_train + num_val)
            write_split(staging / f"{split}.jsonl", samples)
            objects.extend(item for sample in samples for item in sample.objects)
    return ScenesSummary(
        folder=folder,
        num_train=num_train,
        num_val=num_val,
        num_objects=len(objects),
        num_polygons=sum(item.geometry == "poly" for item in objects),
    )


def _check_arguments(num_train: int, num_val: int, image_size: int, polygon_share: float) -> None:
    for name, value, low, high in (
        ("num_train", num_train, 1, 1_000_000),
        ("num_val", num_val, 1, 1_000_000),
        ("image_size", image_size, 64, 2048),
        ("polygon_share", polygon_share, 0, 1),
    ):
        if not low <= value <= high:
            raise DataError(f"scenes {name}: got {value}, expected {low} to {high}")


def split_shapes(seed: int) -> tuple[list[DigitShape], list[DigitShape]]:
    """Return the shapes of all scans, those for train and those for validation."""
    scans = _scanned_shapes()
    order = np.random.default_rng([seed, len(SPLITS)]).permutation(len(scans))
    num_validation = round(VALIDATION_SHARE * len(order))
    shapes = [scans[index] for index in order]
    return shapes[num_validation:], shapes[:num_validation]


@cache
def _scanned_shapes() -> tuple[DigitShape, ...]:
    """Outlines take seconds, so they are drawn once a process."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return tuple(
        digit_shape(ink, int(digit)) for ink, digit in zip(digits.images, digits.target, strict=True)
    )


def _write_scene(
    folder: Path,
    name: str,
    shapes: Sequence[DigitShape],
    settings: SceneSettings,
    generator: np.random.Generator,
) -> DraftSample:
    from PIL import Image

    scene = draw_scene(shapes, settings, generator)
    path = f"images/{name}.png"
    Image.fromarray(scene.pixels).save(folder / path, compress_level=1)
    side = settings.image_side_pixels
    return DraftSample(image_path=path, width=side, height=side, objects=scene.objects, sample_id=name)
