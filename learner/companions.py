"""The tokenizer and processor files that go with weights, so that a folder of them is a whole model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from broker_schemas.errors import DataError, RunStopped
from broker_schemas.method.processor_file import ImageBounds, write_image_bounds


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The model folder whose files go along, and the image bounds of the run, which they then name."""

    folder: Path
    bounds: ImageBounds

    def copy_to(self, destination: Path) -> None:
        """Copy tokenizer, processor and template files; weights and model config stay.

        Other programs then resize images as training did. Raises RunStopped for a broken processor's file.
        """
        for path in sorted(self.folder.iterdir()):
            weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth"} or path.name.endswith(
                ".index.json"
            )
            foreign = path.name in {"config.json", "generation_config.json", "made_by_rollstream.json"}
            if path.is_file() and not weights and not foreign and not path.name.startswith("."):
                shutil.copyfile(path, destination / path.name)
        try:
            write_image_bounds(destination, self.bounds)
        except DataError as exc:
            raise RunStopped(str(exc)) from exc
