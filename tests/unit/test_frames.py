"""Frames of the archive: a torn end is told from damage, whichever byte is hit, in files old and new."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from broker_schemas.errors import RunStopped
from broker_schemas.records import codec
from rollstream.history.frame_file import FrameFile
from rollstream.history.frames import OLD_HEAD, Damage, Frame, TornEnd, encode_frame, scan_frames

BODIES = [
    {"id": f"{n + 1}-0", "after": f"{n}-0", "type": "pushed", "fields": {"records": b"\xf5RS2" * n}}
    for n in range(9)
]
OLD_BODIES = [{"id": f"{n + 1}-0", "type": "pushed", "fields": {"records": b"x" * n}} for n in range(9)]


def old_frame(body: dict[str, object]) -> bytes:
    raw = codec.encode_map(body)
    return OLD_HEAD.pack(len(raw)) + raw


FILES = {
    "new": [encode_frame(body) for body in BODIES],
    "old": [old_frame(body) for body in OLD_BODIES],
    "old then new": [*map(old_frame, OLD_BODIES[:4]), *map(encode_frame, BODIES[4:])],
}


def scan(path: Path, raw: bytes) -> tuple[list[str], list[Damage], list[TornEnd]]:
    path.write_bytes(raw)
    found = list(scan_frames(path))
    frames = [item.body["id"] for item in found if isinstance(item, Frame)]
    damages = [item for item in found if isinstance(item, Damage)]
    return frames, damages, [item for item in found if isinstance(item, TornEnd)]


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_of_every_kind_are_read_to_their_end(kind: str, tmp_path: Path) -> None:
    frames, damages, torn = scan(tmp_path / "f", b"".join(FILES[kind]))

    assert frames == [f"{n + 1}-0" for n in range(9)]
    assert (damages, torn) == ([], [])


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_at_any_byte_is_torn_and_keeps_every_whole_frame(kind: str, tmp_path: Path) -> None:
    raw = b"".join(FILES[kind])
    ends = [len(b"".join(FILES[kind][: n + 1])) for n in range(9)]
    for size in range(1, len(raw)):
        frames, damages, torn = scan(tmp_path / "f", raw[:size])

        assert len(frames) == sum(end <= size for end in ends), size
        assert damages == [], size
        assert bool(torn) == (size not in ends), size


@pytest.mark.req("Q-20")
def test_any_flipped_bit_of_a_checksummed_file_is_damage_and_costs_its_frame_alone(tmp_path: Path) -> None:
    raw = b"".join(FILES["new"])
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8

        frames, damages, torn = scan(tmp_path / "f", bytes(flipped))

        assert len(frames) == 8, bit
        assert len(damages) == 1, bit
        assert torn == [], bit


@pytest.mark.req("Q-20")
def test_a_flipped_bit_in_a_length_of_an_old_file_cuts_nothing(tmp_path: Path) -> None:
    raw, second = b"".join(FILES["old"]), len(FILES["old"][0])
    for bit in range(32):
        flipped = bytearray(raw)
        flipped[second + bit // 8] ^= 1 << bit % 8

        frames, damages, torn = scan(tmp_path / "f", bytes(flipped))

        assert frames == [f"{n + 1}-0" for n in range(9) if n != 1], bit
        assert len(damages) == 1, bit
        assert torn == [], bit


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_damage_and_never_an_empty_archive(seed: int, tmp_path: Path) -> None:
    noise = random.Random(seed).randbytes(5000)

    assert scan(tmp_path / "f", noise)[1], "alone"
    frames, damages, _ = scan(tmp_path / "f", FILES["new"][0] + noise + FILES["new"][1])
    assert (len(frames), len(damages)) == (2, 1)


def test_blocks_that_a_power_cut_left_empty_are_a_torn_end(tmp_path: Path) -> None:
    frames, damages, torn = scan(tmp_path / "f", FILES["new"][0] + bytes(4096))

    assert (len(frames), damages, len(torn)) == (1, [], 1)


@pytest.mark.req("Q-20")
def test_a_writer_cuts_a_torn_end_with_a_word_and_leaves_damage_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, first, second = tmp_path / "f", FILES["new"][0], FILES["new"][1]
    path.write_bytes(first + b"\x00damaged\x01" + second + FILES["new"][2][:-3])

    file = FrameFile(path)
    file.append([BODIES[3]])
    file.close()

    assert path.read_bytes() == first + b"\x00damaged\x01" + second + FILES["new"][3]
    assert "cut off bytes" in caplog.text
    assert f"damaged from byte {len(first)} to {len(first) + 9}" in caplog.text


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_nothing_is_appended_to_a_file_that_is_no_longer_there(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    file = FrameFile(folder / "f")
    file.append([BODIES[0]])
    if how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        (folder / "f").unlink()
    if how == "replaced":
        (folder / "f").write_bytes(b"")

    with pytest.raises(RunStopped, match="moved, replaced or removed"):
        file.append([BODIES[1]])
    file.close()


@pytest.mark.req("Q-20")
def test_a_disk_that_takes_half_a_batch_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    file = FrameFile(path)
    file.append([BODIES[0]])
    whole = path.read_bytes()
    import os

    write = os.write
    monkeypatch.setattr("rollstream.history.frame_file.os.write", lambda fd, raw: write(fd, raw[:10]))

    with pytest.raises(OSError, match="the disk took 10 of"):
        file.append([BODIES[1]])

    assert path.read_bytes() == whole
    file.close()
