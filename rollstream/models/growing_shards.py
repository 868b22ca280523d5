"""Copies safetensors files with some tensors grown by rows, a piece at a time: no tensor is held whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    import torch

from broker_schemas.errors import DataError
from broker_schemas.method.weight_files import INDEX_NAME, StoredTensor, read_header, read_index, tensors_of

PIECE_BYTES: Final = 16 << 20
TORCH_NAMES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What one tensor (rows, width) becomes: ``num_rows`` rows, those in ``rows_by_index`` taking the place
    of what stood there, new ones in neither being zero.
    """

    num_rows: int
    rows_by_index: Mapping[int, bytes]


def read_rows(tensor: StoredTensor, indices: list[int]) -> torch.Tensor:
    """Return (n, width) float32: the rows of a stored tensor; raises DataError for an unknown format."""
    import torch

    if tensor.dtype not in TORCH_NAMES:
        raise DataError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}, expected one of {', '.join(TORCH_NAMES)}; "
            "adapt the checkpoint as published, before it is quantized"
        )
    row_bytes, rows = tensor.num_bytes // tensor.shape[0], []
    with tensor.file.open("rb") as stream:
        for index in indices:
            stream.seek(tensor.first_byte + index * row_bytes)
            piece = bytearray(stream.read(row_bytes))
            rows.append(torch.frombuffer(piece, dtype=getattr(torch, TORCH_NAMES[tensor.dtype])).float())
    return torch.stack(rows)


def row_bytes_of(rows: torch.Tensor, dtype: str) -> list[bytes]:
    """Return each row of ``rows`` as the bytes that a file of ``dtype`` holds."""
    import torch

    stored = rows.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    return [row.view(torch.uint8).numpy().tobytes() for row in stored]


def copy_grown(
    source: Path, target: Path, growths: Mapping[str, Growth], progress: Callable[[int], None]
) -> None:
    """Copy the file ``source`` to ``target`` with ``growths`` (by tensor name); ``progress`` hears of bytes.

    Metadata, names, order and bytes of all else stay.
    """
    tensors = tensors_of(source)
    header, _ = read_header(source)
    place = 0
    for tensor in tensors:
        growth, entry = growths.get(tensor.name), header[tensor.name]
        num_bytes = tensor.num_bytes
        if growth is not None:
            num_bytes = tensor.num_bytes // tensor.shape[0] * growth.num_rows
            entry["shape"] = [growth.num_rows, *tensor.shape[1:]]
        entry["data_offsets"] = [place, place + num_bytes]
        place += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers want the data aligned
    with source.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(encoded)) + encoded)
        start = write.tell()
        for tensor in tensors:
            _copy_tensor(read, write, tensor, growths.get(tensor.name), progress)
        if write.tell() != start + place:
            raise DataError(f"{source}: ended before its tensors did; download it again")


def update_index(folder: Path, num_more_bytes: int, num_more_values: int) -> None:
    """Add to the totals that the index of a sharded checkpoint names, if there is one."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return
    index = read_index(path)
    totals = index.get("metadata")
    if isinstance(totals, dict):
        for key, more in (("total_size", num_more_bytes), ("total_parameters", num_more_values)):
            if isinstance(totals.get(key), int):
                totals[key] += more
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_tensor(
    read: BinaryIO,
    write: BinaryIO,
    tensor: StoredTensor,
    growth: Growth | None,
    progress: Callable[[int], None],
) -> None:
    began = write.tell()
    read.seek(tensor.first_byte)
    left = tensor.num_bytes
    while left and (piece := read.read(min(left, PIECE_BYTES))):
        write.write(piece)
        left -= len(piece)
        progress(len(piece))
    if growth is None:
        return
    row_bytes = tensor.num_bytes // tensor.shape[0]
    write.write(b"\0" * row_bytes * (growth.num_rows - tensor.shape[0]))
    for index, row in growth.rows_by_index.items():
        write.seek(began + index * row_bytes)
        write.write(row)
    write.seek(began + growth.num_rows * row_bytes)
