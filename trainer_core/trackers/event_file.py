"""Write TensorBoard event files without TensorBoard: records of protobuf messages, each with checksums.

record = length (uint64) | masked crc of it | message | masked crc of it,   mask(c) = rotr(c, 15) + 0xa282ead8

All numbers are little-endian.

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto; field numbers as there and in
tensorboard/plugins/hparams/plugin_data.proto.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

CASTAGNOLI = 0x82F63B78  # polynomial of CRC-32C, reflected
NUM_LANES = 1024  # pieces of a long message whose checksums are computed in parallel
SHORT = 8192  # bytes; for shorter messages the plain loop is as fast
STRING = 7  # tensorflow.DataType.DT_STRING
TENSOR, PICTURES = 2, 3  # tensorboard.DataClass
SUCCESS, FAILURE = 1, 2  # tensorboard.hparams.Status

Value = bool | int | float | str | bytes


@cache
def _table() -> np.ndarray:
    """Return (256,) uint32: the CRC of each byte."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(CASTAGNOLI), np.uint32(0))
    return values


@cache
def _listed() -> list[int]:
    return _table().tolist()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C.

    Long data is split into lanes of equal length, which are computed in parallel and then joined:

    after(A | B) = zeros(after(A), |B|) ^ after(B),   zeros(c, n): c after n bytes of zeros, linear in c.
    """
    if len(data) < SHORT:
        table, state = _listed(), 0xFFFFFFFF
        for byte in data:
            state = table[(state ^ byte) & 255] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    width = -(-len(data) // NUM_LANES)
    padded = np.zeros(NUM_LANES * width, np.uint8)  # leading zeros change nothing, because the initial state is 0
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) : len(padded) - len(data) + 4] ^= 255  # equivalent to an initial state of 0xffffffff
    columns = np.zeros((width, NUM_LANES + 32), np.uint8)
    columns[:, :NUM_LANES] = padded.reshape(NUM_LANES, width).T
    # The 32 additional states compute zeros().
    states = np.concatenate([np.zeros(NUM_LANES, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)])
    table = _table()
    for column in columns:
        states = table[(states ^ column) & 255] ^ (states >> 8)
    *lanes, state = *states[:NUM_LANES].tolist(), 0
    after_zeros = states[NUM_LANES:].tolist()
    for lane in lanes:
        moved = lane
        for bit in range(32):
            if state >> bit & 1:
                moved ^= after_zeros[bit]
        state = moved
    return state ^ 0xFFFFFFFF


def mask_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", mask_crc(length)) + message + struct.pack("<I", mask_crc(message))


def varint(value: int) -> bytes:
    """Return a non-negative integer as a protobuf varint."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def field(number: int, value: Value) -> bytes:
    """Return one field of a message: integers as varint, floats as double, strings and messages with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(int(value))
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def single(number: int, value: float) -> bytes:
    """Return a 32-bit float field. Values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return varint(number << 3 | 5) + np.float32(value).astype("<f4").tobytes()


def metadata(plugin: str, content: bytes = b"", description: str = "", data_class: int = 0) -> bytes:
    """Return SummaryMetadata, which selects the page of TensorBoard that shows a value.

    Args:
        plugin: Name of the page's plugin.
        content: Data of the plugin.
        description: Text shown beside the value.
        data_class: TENSOR or PICTURES, 0 for none.
    """
    data = field(1, plugin) + (field(2, content) if content else b"")
    return (
        field(1, data) + (field(3, description) if description else b"") + (field(4, data_class) if data_class else b"")
    )


def strings(*values: bytes) -> bytes:
    """Return a TensorProto: a vector of strings."""
    return field(1, STRING) + field(2, field(2, field(1, len(values)))) + b"".join(field(8, value) for value in values)


def scalar(tag: str, value: float) -> bytes:
    """Return a Summary.Value: one point of a curve."""
    return field(1, tag) + single(2, value)


def text(tag: str, markdown: str) -> bytes:
    """Return a Summary.Value: Markdown text."""
    return field(1, tag) + field(9, metadata("text", data_class=TENSOR)) + field(8, strings(markdown.encode("utf-8")))


def image(tag: str, png: bytes, description: str = "") -> bytes:
    """Return a Summary.Value: an encoded PNG, whose size is read from its header."""
    width, height = struct.unpack(">II", png[16:24])
    tensor = strings(str(width).encode(), str(height).encode(), png)
    return field(1, tag) + field(9, metadata("images", field(1, 1), description, PICTURES)) + field(8, tensor)


def session_start(name: str, values: Iterable[tuple[str, str | float | bool]]) -> bytes:
    """Return a Summary.Value: the hyperparameters that the page "HParams" compares runs by."""
    body = b"".join(field(1, field(1, key) + field(2, _struct_value(value))) for key, value in values)
    session = body + field(4, name) + field(5, time.time())
    return field(1, "_hparams_/session_start_info") + field(9, metadata("hparams", field(3, session)))


def session_end(failed: bool) -> bytes:
    """Return a Summary.Value: how the session ended."""
    session = field(1, FAILURE if failed else SUCCESS) + field(2, time.time())
    return field(1, "_hparams_/session_end_info") + field(9, metadata("hparams", field(4, session)))


def _struct_value(value: str | float | bool) -> bytes:
    """Return a google.protobuf.Value."""
    if isinstance(value, bool):
        return field(4, value)
    return field(2, float(value)) if isinstance(value, (int, float)) else field(3, value)


class EventFile:
    """A new event file in a folder. Every event is written immediately, so that a killed process loses none.

    Args:
        folder: Folder of the event files; the new one sorts after the existing ones.
        first_step: Events of this and later steps in earlier files of the folder are void.
    Raises:
        OSError: The disk is full or not writable.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _create_file(folder)
        self.write(0, field(3, "brain.Event:2"))
        self.write(first_step, field(7, field(1, 1)))  # SessionLog: START

    def write(self, step: int, what: bytes) -> None:
        event = field(1, time.time()) + field(2, step) + what
        self._file.write(record(event))

    def add(self, step: int, *values: bytes) -> None:
        """Write one Summary of several Summary.Values."""
        self.write(step, field(5, b"".join(field(1, value) for value in values)))

    def close(self) -> None:
        self._file.close()


def _create_file(folder: Path):
    """Create the file under a name that sorts last, because TensorBoard reads a folder's files in the order of their
    names.
    """
    stem = f"events.out.tfevents.{int(time.time()):010d}"
    for number in range(1000):
        try:
            return (folder / f"{stem}.{number:03d}").open("xb", buffering=0)
        except FileExistsError:
            continue
    raise FileExistsError(f"{folder} already has 1000 event files with the current timestamp")
