"""TensorBoard's format: checksums by their definition, records as its own reader takes them."""

from __future__ import annotations

import random
import struct

import pytest
from chroma_trainer.trainer_core.trackers import event_file
from chroma_trainer.trainer_core.trackers.event_file import (
    SHORT,
    EventFile,
    crc32c,
    field,
    mask_crc,
    record,
    scalar,
    single,
    varint,
)


def bitwise(data: bytes) -> int:
    """CRC-32C by its definition, a bit at a time."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_the_known_checksums():
    """RFC 3720, appendix B.4, and the check value of CRC-32C."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(b"") == 0


@pytest.mark.parametrize("length", [SHORT, SHORT + 1, 12_345, 20_480])
def test_lanes_give_the_plain_checksum(length, monkeypatch):
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == bitwise(data)
    monkeypatch.setattr(event_file, "SHORT", length + 1)
    assert crc32c(data) == bitwise(data)


def test_a_record():
    raw = record(b"abc")
    length, of_length = struct.unpack("<QI", raw[:12])
    assert (length, of_length) == (3, mask_crc(raw[:8])) and raw[12:15] == b"abc"
    assert struct.unpack("<I", raw[15:]) == (mask_crc(b"abc"),)


def test_numbers_of_messages():
    """protobuf.dev/programming-guides/encoding: 150 is 96 01; field 2 with "testing"."""
    assert varint(150) == b"\x96\x01" and varint(0) == b"\x00" and varint(127) == b"\x7f"
    assert field(1, 150) == b"\x08\x96\x01" and field(2, "testing") == b"\x12\x07testing"
    assert field(1, 1.0) == b"\x09" + struct.pack("<d", 1.0) and field(4, True) == b"\x20\x01"
    assert single(2, 1.0) == b"\x15" + struct.pack("<f", 1.0) and single(2, 1e300) == b"\x15" + struct.pack(
        "<f", float("inf")
    )


def test_every_start_has_a_file_of_its_own_in_the_order_of_the_starts(tmp_path):
    for step in (0, 3, 3):
        file = EventFile(tmp_path / "tensorboard", step)
        file.add(step + 1, scalar("a", 1.0))
        assert any(b"brain.Event:2" in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
        file.close()
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert len(names) == 3 and all(name.startswith("events.out.tfevents.") for name in names)
