"""Files of checksummed frames: how one is written, and how damage in the middle is told from a torn end.

A frame is a head (mark, length, checksum of the body, checksum of the head) and a msgpack map. Older files
hold frames of a length and a map alone; both kinds may stand in one file. Nothing here knows what they mean.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import RecordError
from broker_schemas.records import codec

# read as the length that older frames begin with, the mark is larger than any of them may be
MARK: Final = b"\xf5RS2"
HEAD: Final = struct.Struct("<4sIII")
_CHECKED: Final = struct.Struct("<4sII")
OLD_HEAD: Final = struct.Struct("<I")
LARGEST_BODY_BYTES: Final = 256 * 1024 * 1024
# how the maps of older frames begin: {"id", "type", "fields"} and {"record_id", "body"}
OLD_STARTS: Final = (b"\x83\xa2id", b"\x82\xa9record_id")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A whole frame: bytes ``start`` to ``end`` of its file, the map in it."""

    start: int
    end: int
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Bytes ``start`` to ``end`` of a file that are no frames, though frames or foreign bytes stand there."""

    path: Path
    start: int
    end: int

    def __str__(self) -> str:
        return (
            f"{self.path}: damaged from byte {self.start} to {self.end}; nothing was cut, what stands there "
            "is lost unless you restore the file from a copy"
        )


@dataclass(frozen=True, kw_only=True)
class TornEnd:
    """The file ends inside a frame that was being written when its writer died; whole up to ``start``."""

    start: int
    end: int


def encode_frame(body: Mapping[str, Any]) -> bytes:
    """Return the bytes of one frame."""
    raw = codec.encode_map(body)
    checked = _CHECKED.pack(MARK, len(raw), zlib.crc32(raw))
    return checked + struct.pack("<I", zlib.crc32(checked)) + raw


def scan_frames(path: Path) -> Iterator[Frame | Damage | TornEnd]:
    """Yield what stands in a file from its start; a missing or empty file holds nothing."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, size = 0, len(data)
        while at < size:
            frame = _frame_at(data, at)
            if frame is not None:
                yield frame
                at = frame.end
                continue
            following = _next_frame(data, at + 1)
            if following < 0:
                is_torn = _is_torn(data, at)
                yield TornEnd(start=at, end=size) if is_torn else Damage(path=path, start=at, end=size)
                return
            yield Damage(path=path, start=at, end=following)
            at = following


def read_frame(data: bytes) -> dict[str, Any]:
    """Return the map of the frame that ``data`` holds, bytes ``start`` to ``end`` of a ``Frame``."""
    head = HEAD if data.startswith(MARK) else OLD_HEAD
    return codec.decode_map(data[head.size :], max_bytes=LARGEST_BODY_BYTES)


def _frame_at(data: mmap.mmap, at: int) -> Frame | None:
    if data[at : at + len(MARK)] == MARK:
        head = data[at : at + HEAD.size]
        length = _checked_length(head)
        start = at + HEAD.size
        raw = data[start : start + length] if length >= 0 else b""
        if length < 0 or len(raw) < length or zlib.crc32(raw) != HEAD.unpack(head)[2]:
            return None
    else:
        head = data[at : at + OLD_HEAD.size]
        if len(head) < OLD_HEAD.size:
            return None
        (length,) = OLD_HEAD.unpack(head)
        start = at + OLD_HEAD.size
        if length > LARGEST_BODY_BYTES or start + length > len(data):
            return None
        raw = data[start : start + length]
    try:
        body = codec.decode_map(raw, max_bytes=LARGEST_BODY_BYTES)
    except RecordError:
        return None
    return Frame(start=at, end=start + length, body=body)


def _checked_length(head: bytes) -> int:
    """Return the length that a whole, true head gives, else -1."""
    if len(head) < HEAD.size:
        return -1
    _, length, _, checksum = HEAD.unpack(head)
    return int(length) if zlib.crc32(head[: _CHECKED.size]) == checksum else -1


def _next_frame(data: mmap.mmap, start: int) -> int:
    """Return where the next whole frame of either kind begins, -1 for none."""
    places = [_next_of(data, start, MARK, 0)]
    places += [_next_of(data, start, mark, OLD_HEAD.size) for mark in OLD_STARTS]
    found = [place for place in places if place >= 0]
    return min(found, default=-1)


def _next_of(data: mmap.mmap, start: int, mark: bytes, before: int) -> int:
    place = data.find(mark, start + before)
    while place >= 0:
        if _frame_at(data, place - before) is not None:
            return place - before
        place = data.find(mark, place + 1)
    return -1


def _is_torn(data: mmap.mmap, at: int) -> bool:
    """Say whether the rest of a file, without a whole frame, is the beginning of one, or empty blocks."""
    head, left = data[at : at + HEAD.size], len(data) - at
    if head.startswith(MARK) or MARK.startswith(head):
        length = _checked_length(head)
        return left < HEAD.size or (length >= 0 and left < HEAD.size + length)
    if not any(data[at:]):
        return True
    if left < OLD_HEAD.size:
        return True
    (length,) = OLD_HEAD.unpack(data[at : at + OLD_HEAD.size])
    body = data[at + OLD_HEAD.size : at + OLD_HEAD.size + max(map(len, OLD_STARTS))]
    is_start = any(body.startswith(start[: len(body)]) for start in OLD_STARTS)
    return length <= LARGEST_BODY_BYTES and left < OLD_HEAD.size + length and is_start
