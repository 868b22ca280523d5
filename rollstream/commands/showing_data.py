"""`rollstream data show`: draws samples of a data set as they are trained, to look at before a run."""

from __future__ import annotations

import random
import re
from pathlib import Path

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import open_image
from rollstream.show.drawing import Shape, draw_shapes


def show_samples(
    source: Path, out: Path, *, num_samples: int, seed: int, sample_ids: tuple[str, ...] = ()
) -> list[Path]:
    """Draw ``num_samples`` of a JSONL file, or of the training set in a folder, chosen by ``seed``.

    ``sample_ids`` names them instead. Returns the pictures in ``out``. Raises DataError for a file that
    breaks the format, an image that cannot be opened, or an id that is not there.
    """
    file = source / "train.jsonl" if source.is_dir() else source
    samples = read_dataset(file, ordering="dataset")
    by_id = {sample.sample_id: sample for sample in samples}
    absent = [name for name in sample_ids if name not in by_id]
    if absent:
        raise DataError(f"{file}: no sample {absent[0]!r}; ids stand in metadata.sample_id")
    chosen = [by_id[name] for name in sample_ids]
    if not chosen:
        chosen = random.Random(seed).sample(samples, min(num_samples, len(samples)))
    out.mkdir(parents=True, exist_ok=True)
    return [_draw(sample, out) for sample in chosen]


def _draw(sample: Sample, out: Path) -> Path:
    shapes = [Shape(label=item.desc, geometry=item.geometry, bins=item.bins) for item in sample.objects]
    target = out / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', sample.sample_id)}.png"
    draw_shapes(open_image(sample.image_files[0]), ground_truth=shapes).save(target)
    return target
