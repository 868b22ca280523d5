"""Writing a safetensors file as a stream: no second copy in memory, and its checksum on the way.

The library's own writer copies every tensor to bytes while it holds the interpreter; training would wait.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

PIECE_BYTES: Final = 16 * 1024 * 1024
DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Final = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """Size and SHA-256 of a file as it was written."""

    size_bytes: int
    sha256: str


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write tensors on the CPU, each contiguous, to ``path`` and bring it to the disk; raises OSError."""
    # wider elements first, so that each tensor begins at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name in names:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for name in names:
            raw = memoryview(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(raw), PIECE_BYTES):
                file.write(raw[start : start + PIECE_BYTES])
                digest.update(raw[start : start + PIECE_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(size_bytes=8 + len(text) + place, sha256=digest.hexdigest())
