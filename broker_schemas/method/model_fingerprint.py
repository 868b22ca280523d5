"""What tells one model folder from another without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

_SAMPLED_BLOCKS: Final = 64
_BLOCK_BYTES: Final = 4096


def model_fingerprint(folder: Path) -> str:
    """Return a digest of a model folder: its JSON files whole, its weights by sizes, heads and samples.

    Seconds for any size: of each weight file 64 blocks are read beside its head.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(path.name.encode())
            _add_samples(digest, path)
    return digest.hexdigest()[:16]


def _add_samples(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(head, size)))
        for number in range(_SAMPLED_BLOCKS):
            file.seek(size * number // _SAMPLED_BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
