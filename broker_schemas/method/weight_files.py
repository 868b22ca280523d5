"""What the safetensors files of a model folder hold, read from their headers: no weight is loaded.

The layout is that of safetensors: eight bytes of length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError

INDEX_NAME: Final = "model.safetensors.index.json"
LARGEST_HEADER_BYTES: Final = 100_000_000
BYTES_BY_DTYPE: Final = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: ``first_byte`` counts from the start of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those its index names, else all of them.

    Raises DataError where there is none, or where one that the index or a file name speaks of is missing.
    """
    index = folder / INDEX_NAME
    present = sorted(folder.glob("*.safetensors"))
    names = set(read_index(index)["weight_map"].values()) if index.is_file() else set()
    missing = sorted(name for name in names if not (folder / name).is_file())
    missing = missing or _gaps([file.name for file in present])
    if missing:
        raise DataError(
            f"model folder {folder}: {len(missing)} shards are missing, first {missing[0]}; "
            "download the checkpoint again, with all its files"
        )
    if not present:
        raise DataError(f"model folder {folder}: no *.safetensors, expected a whole checkpoint")
    return sorted(folder / name for name in names) if names else present


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model folder by name.

    Raises DataError for a missing shard, a file that is cut short or no safetensors file, or a tensor that
    the index names and no file holds.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found |= {tensor.name: tensor for tensor in tensors_of(file)}
    index = folder / INDEX_NAME
    if index.is_file():
        lost = sorted(set(read_index(index)["weight_map"]) - set(found))
        if lost:
            raise DataError(
                f"{index}: names {len(lost)} tensors that no file holds, first {lost[0]}; "
                "download the checkpoint again"
            )
    return found


def tensors_of(file: Path) -> list[StoredTensor]:
    """Return the tensors of one file in the order of their bytes; raises DataError for a broken file."""
    header, data_starts_at = read_header(file)
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = (int(offset) for offset in entry["data_offsets"])
            shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
        except (KeyError, TypeError, ValueError) as exc:
            raise _broken(file, f"the entry of {name} cannot be read") from exc
        if dtype in BYTES_BY_DTYPE and math.prod(shape) * BYTES_BY_DTYPE[dtype] != last - first:
            raise _broken(file, f"{name} has {last - first} bytes for {dtype} {list(shape)}")
        tensors.append(
            StoredTensor(
                name=name,
                file=file,
                dtype=dtype,
                shape=shape,
                first_byte=data_starts_at + first,
                num_bytes=last - first,
            )
        )
    tensors.sort(key=lambda tensor: tensor.first_byte)
    wanted = max((tensor.first_byte + tensor.num_bytes for tensor in tensors), default=data_starts_at)
    if file.stat().st_size < wanted:
        raise _broken(file, f"it has {file.stat().st_size} bytes, its header speaks of {wanted}")
    return tensors


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file and the place where its tensors' bytes begin; raises DataError."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError, struct.error) as exc:
        raise _broken(file, str(exc)) from exc
    if not isinstance(header, dict):
        raise _broken(file, "its header is no map")
    return header, 8 + length


def read_index(index: Path) -> dict[str, Any]:
    """Return the index of a sharded checkpoint, with its ``weight_map``; raises DataError."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(content["weight_map"], dict):
            raise ValueError("weight_map is no map")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as exc:
        raise DataError(f"{index}: not the index of a checkpoint ({exc}); download it again") from exc
    return dict(content)


def _gaps(names: list[str]) -> list[str]:
    # shards say how many there are: model-00001-of-00004.safetensors
    stems = [name.removesuffix(".safetensors").rsplit("-of-", 1) for name in names]
    counts = {stem[1] for stem in stems if len(stem) == 2 and stem[1].isdigit()}
    if len(counts) != 1:
        return []
    count = counts.pop()
    head = next(stem[0] for stem in stems if len(stem) == 2).rsplit("-", 1)[0]
    expected = [
        f"{head}-{number:0{len(count)}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)
    ]
    return sorted(set(expected) - set(names))


def _broken(file: Path, why: str) -> DataError:
    return DataError(f"{file}: not a whole safetensors file ({why}); download it again")
