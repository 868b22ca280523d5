"""Writes data set lines in rollstream's JSONL format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broker_schemas.records.records import GroundTruthObject


@dataclass(frozen=True, kw_only=True)
class DraftSample:
    """One line to be written; ``image_path`` is relative to the JSONL file, with forward slashes."""

    image_path: str
    width: int
    height: int
    objects: tuple[GroundTruthObject, ...]
    sample_id: str


def write_split(file: Path, samples: Iterable[DraftSample]) -> int:
    """Write one JSON line a sample to ``file`` and return how many there were."""
    lines = [json.dumps(_to_line(sample), ensure_ascii=False) for sample in samples]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return len(lines)


def _to_line(sample: DraftSample) -> dict[str, object]:
    return {
        "images": [sample.image_path],
        "width": sample.width,
        "height": sample.height,
        "objects": [item.to_body() for item in sample.objects],
        "metadata": {"sample_id": sample.sample_id},
    }
