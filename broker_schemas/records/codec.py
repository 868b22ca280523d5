"""Bytes of a record: msgpack maps, little-endian arrays, bit-packed masks.

Knows nothing of what the records mean. Never pickle, never an import path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import MalformedRecord, RecordTooLarge

MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_CONTAINER_ITEMS = 1 << 20
WINDOW_BYTES: Final = 1 << 16
"""A body up to this size is decoded at once: copying it is cheaper than going around it."""
MOST_ITEMS_IN_PLACE: Final = 64
BIN_32: Final = 0xC6


def encode_map(body: Mapping[str, Any]) -> bytes:
    """Return ``body`` as a msgpack map; keys keep their order, so equal input gives equal bytes."""
    return bytes(msgpack.packb(body, use_bin_type=True))


def decode_map(raw: bytes, *, max_bytes: int = MAX_RECORD_BYTES, is_in_place: bool = False) -> dict[str, Any]:
    """Return the msgpack map in ``raw``.

    The size is checked before anything is decoded. ``is_in_place`` leaves long binary values of the map where
    they are: they come as memoryviews of ``raw``.
    Raises RecordTooLarge above ``max_bytes``, MalformedRecord for anything but one map with string keys.
    """
    if len(raw) > max_bytes:
        raise RecordTooLarge(f"record: got {len(raw)} bytes, expected at most {max_bytes}")
    options: dict[str, Any] = {
        "raw": False,
        "strict_map_key": True,
        "max_str_len": max_bytes,
        "max_bin_len": max_bytes,
        "max_array_len": MAX_CONTAINER_ITEMS,
        "max_map_len": MAX_CONTAINER_ITEMS,
        "max_ext_len": 0,
    }
    if is_in_place and len(raw) > WINDOW_BYTES:
        viewed = _map_in_place(memoryview(raw), options)
        if viewed is not None:
            return viewed
    try:
        body = msgpack.unpackb(raw, **options)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise MalformedRecord(f"record: not a msgpack map ({type(exc).__name__}: {exc})") from exc
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise MalformedRecord(f"record: got {type(body).__name__}, expected a map with string keys")
    return body


def _map_in_place(raw: memoryview, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the map with its long binary values as views of ``raw``; None where the plain way must judge."""
    if raw[0] == 0xDE:
        num_items, at = int.from_bytes(raw[1:3], "big"), 3
    elif raw[0] == 0xDF:
        num_items, at = int.from_bytes(raw[1:5], "big"), 5
    else:
        num_items, at = raw[0] & 0x0F, 1
        if raw[0] >> 4 != 0x8:
            return None
    if num_items > MOST_ITEMS_IN_PLACE:
        return None
    body: dict[str, Any] = {}
    window: Any = None
    try:
        for _ in range(num_items):
            if window is None:
                start, window = at, msgpack.Unpacker(**options)
                window.feed(raw[at : at + WINDOW_BYTES])
            key = window.unpack()
            at = start + window.tell()
            head = raw[at]
            length = int.from_bytes(raw[at + 1 : at + 5], "big") if head == BIN_32 else 0
            if length:
                body[key], window = raw[at + 5 : at + 5 + length], None
                at += 5 + length
            else:
                body[key] = window.unpack()
                at = start + window.tell()
    except (ValueError, TypeError, RecursionError, IndexError, msgpack.UnpackException):
        return None
    return body if at == len(raw) and all(isinstance(key, str) for key in body) else None


def encode_array(values: NDArray[Any], dtype: str) -> bytes | memoryview:
    """Return a one-dimensional array as raw bytes of ``dtype`` (say ``"<i4"``), copied only to convert."""
    array = np.ascontiguousarray(values, dtype=np.dtype(dtype))
    return array.data.cast("B") if len(array) else b""


def decode_array(raw: object, dtype: str, *, field: str) -> NDArray[Any]:
    """Return the one-dimensional, read-only array of ``dtype`` in ``raw``; raises MalformedRecord."""
    item_bytes = np.dtype(dtype).itemsize
    if not isinstance(raw, bytes | memoryview):
        raise MalformedRecord(f"{field}: got {type(raw).__name__}, expected bytes of {dtype}")
    if len(raw) % item_bytes:
        raise MalformedRecord(f"{field}: got {len(raw)} bytes, expected a multiple of {item_bytes}")
    return np.frombuffer(raw, dtype=np.dtype(dtype))


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Return a boolean array bit-packed, first element in the lowest bit; the length is not stored."""
    return np.packbits(np.asarray(mask, dtype=np.bool_), bitorder="little").tobytes()


def decode_mask(raw: object, length: int, *, field: str) -> NDArray[np.bool_]:
    """Return the boolean array of ``length`` in ``raw``; raises MalformedRecord."""
    if not isinstance(raw, bytes | memoryview) or len(raw) != (length + 7) // 8:
        got = f"{len(raw)} bytes" if isinstance(raw, bytes | memoryview) else type(raw).__name__
        raise MalformedRecord(f"{field}: got {got}, expected {(length + 7) // 8} bytes for {length} bits")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=length, bitorder="little")
    return bits.astype(np.bool_)
