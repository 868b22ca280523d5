"""Bytes of a record: msgpack maps, little-endian arrays, bit-packed masks.

Knows nothing of what the records mean. Never pickle, never an import path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import MalformedRecord, RecordTooLarge

MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_CONTAINER_ITEMS = 1 << 20


def encode_map(body: Mapping[str, Any]) -> bytes:
    """Return ``body`` as a msgpack map; keys keep their order, so equal input gives equal bytes."""
    return bytes(msgpack.packb(body, use_bin_type=True))


def decode_map(raw: bytes, *, max_bytes: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """Return the msgpack map in ``raw``.

    The size is checked before anything is decoded.
    Raises RecordTooLarge above ``max_bytes``, MalformedRecord for anything but one map with string keys.
    """
    if len(raw) > max_bytes:
        raise RecordTooLarge(f"record: got {len(raw)} bytes, expected at most {max_bytes}")
    try:
        body = msgpack.unpackb(
            raw,
            raw=False,
            strict_map_key=True,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_array_len=MAX_CONTAINER_ITEMS,
            max_map_len=MAX_CONTAINER_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise MalformedRecord(f"record: not a msgpack map ({type(exc).__name__}: {exc})") from exc
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise MalformedRecord(f"record: got {type(body).__name__}, expected a map with string keys")
    return body


def encode_array(values: NDArray[Any], dtype: str) -> bytes:
    """Return a one-dimensional array as raw bytes of ``dtype`` (say ``"<i4"``)."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype)).tobytes()


def decode_array(raw: object, dtype: str, *, field: str) -> NDArray[Any]:
    """Return the one-dimensional, read-only array of ``dtype`` in ``raw``; raises MalformedRecord."""
    item_bytes = np.dtype(dtype).itemsize
    if not isinstance(raw, bytes):
        raise MalformedRecord(f"{field}: got {type(raw).__name__}, expected bytes of {dtype}")
    if len(raw) % item_bytes:
        raise MalformedRecord(f"{field}: got {len(raw)} bytes, expected a multiple of {item_bytes}")
    return np.frombuffer(raw, dtype=np.dtype(dtype))


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Return a boolean array bit-packed, first element in the lowest bit; the length is not stored."""
    return np.packbits(np.asarray(mask, dtype=np.bool_), bitorder="little").tobytes()


def decode_mask(raw: object, length: int, *, field: str) -> NDArray[np.bool_]:
    """Return the boolean array of ``length`` in ``raw``; raises MalformedRecord."""
    if not isinstance(raw, bytes) or len(raw) != (length + 7) // 8:
        got = f"{len(raw)} bytes" if isinstance(raw, bytes) else type(raw).__name__
        raise MalformedRecord(f"{field}: got {got}, expected {(length + 7) // 8} bytes for {length} bits")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=length, bitorder="little")
    return bits.astype(np.bool_)
