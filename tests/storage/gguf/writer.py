"""GGUF files for tests, and decoders of their blocks written value by value, as the format's description has them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "BF16": 30}  # fmt: skip
SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18)}  # fmt: skip
ALIGNMENT = 32
Tensor = tuple[str, tuple[int, ...], bytes]  # type, shape as in torch, bytes


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def write_gguf(
    path: Path, tensors: Mapping[str, Tensor], architecture: str = "flux", more: bytes = b"", num_more: int = 0
) -> Path:
    """more: further metadata entries, encoded."""
    infos, data = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % ALIGNMENT)
        infos += (
            text(name)
            + struct.pack("<I", len(shape))
            + b"".join(struct.pack("<Q", length) for length in reversed(shape))
        )
        infos += struct.pack("<IQ", TYPES[kind], len(data))
        data += raw
    entries = text("general.architecture") + struct.pack("<I", 8) + text(architecture) + more
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1 + num_more) + entries + infos
    path.write_bytes(header + b"\0" * (-len(header) % ALIGNMENT) + data)
    return path


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def f32(value: float) -> float:
    """Round as a float of C does."""
    return float(numpy.float32(value))


def six_bits(raw: bytes, i: int) -> tuple[int, int]:
    """Scale and offset i of a K-block's 12 bytes."""
    if i < 4:
        return raw[i] & 63, raw[i + 4] & 63
    return (raw[i + 4] & 15) | ((raw[i - 4] >> 6) << 4), (raw[i + 4] >> 4) | ((raw[i] >> 6) << 4)


def decode_block(kind: str, raw: bytes) -> list[float]:
    """The values of one block, computed one by one."""
    signed = numpy.frombuffer(raw, numpy.int8)
    if kind == "Q8_0":
        return [f32(half(raw[:2]) * int(q)) for q in signed[2:]]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        has_offset, has_fifth = kind.endswith("1"), kind.startswith("Q5")
        start = 4 if has_offset else 2
        fifth = int.from_bytes(raw[start : start + 4], "little") if has_fifth else 0
        codes = raw[start + 4 :] if has_fifth else raw[start:]
        values = []
        for i in range(32):
            q = (codes[i] & 15 if i < 16 else codes[i - 16] >> 4) | (((fifth >> i) & 1) << 4)
            if has_offset:
                values.append(f32(f32(half(raw[:2]) * q) + half(raw[2:4])))
            else:
                values.append(f32(half(raw[:2]) * (q - (16 if has_fifth else 8))))
        return values
    if kind in ("Q4_K", "Q5_K"):
        d, m, values = half(raw[:2]), half(raw[2:4]), []
        high, codes = (raw[16:48], raw[48:]) if kind == "Q5_K" else (bytes(32), raw[16:])
        for i in range(256):
            group, place = i // 32, i % 32
            byte = codes[group // 2 * 32 + place]
            q = (byte & 15 if group % 2 == 0 else byte >> 4) | (((high[place] >> group) & 1) << 4)
            scale, offset = six_bits(raw[4:16], group)
            values.append(f32(f32(f32(d * scale) * q) - f32(m * offset)))
        return values
    if kind == "Q6_K":
        low, high, scales, d, values = raw[:128], raw[128:192], signed[192:208], half(raw[208:]), [0.0] * 256
        for n in range(2):
            for place in range(32):
                for quarter in range(4):
                    byte = low[64 * n + place + 32 * (quarter % 2)]
                    q = (byte & 15 if quarter < 2 else byte >> 4) | (((high[32 * n + place] >> (2 * quarter)) & 3) << 4)
                    scale = int(scales[8 * n + 2 * quarter + place // 16])
                    values[128 * n + 32 * quarter + place] = f32(f32(d * scale) * (q - 32))
        return values
    if kind == "Q2_K":
        d, m, values = half(raw[80:82]), half(raw[82:84]), []
        for i in range(256):
            n, quarter, place = i // 128, i % 128 // 32, i % 32
            q = (raw[16 + 32 * n + place] >> (2 * quarter)) & 3
            scale = raw[i // 16]
            values.append(f32(f32(f32(d * (scale & 15)) * q) - f32(m * (scale >> 4))))
        return values
    assert kind == "Q3_K"
    d, values = half(raw[108:]), []
    for i in range(256):
        n, quarter, place, group = i // 128, i % 128 // 32, i % 32, i // 16
        q = (raw[32 + 32 * n + place] >> (2 * quarter)) & 3
        q -= 0 if (raw[place] >> (4 * n + quarter)) & 1 else 4
        packed = raw[96:108]
        low = packed[group % 8] & 15 if group < 8 else packed[group % 8] >> 4
        scale = (low | (((packed[8 + group % 4] >> (2 * (group // 4))) & 3) << 4)) - 32
        values.append(f32(f32(d * scale) * q))
    return values


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> bytes:
    """Random codes with sound fp16 scales."""
    values, size = SIZES[kind]
    draw = numpy.random.default_rng(seed)
    raw = draw.integers(0, 256, (rows * width // values, size), numpy.uint8)
    halves = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(
        kind, (0, 2) if kind in ("Q4_K", "Q5_K", "Q4_1", "Q5_1") else (0,)
    )
    for at in halves:
        raw[:, at : at + 2] = draw.normal(0, 0.02, len(raw)).astype(numpy.float16)[:, None].view(numpy.uint8)
    return raw.tobytes()


def quantize(kind: str, weight: numpy.ndarray) -> bytes:
    """Blocks of Q8_0, or of fp types, for a weight: nearest codes."""
    if kind == "F32":
        return weight.astype(numpy.float32).tobytes()
    if kind == "F16":
        return weight.astype(numpy.float16).tobytes()
    assert kind == "Q8_0"
    blocks = weight.astype(numpy.float32).reshape(-1, 32)
    d = (numpy.abs(blocks).max(1, keepdims=True) / 127).astype(numpy.float16)
    codes = numpy.rint(blocks / numpy.maximum(d.astype(numpy.float32), 1e-8)).clip(-127, 127).astype(numpy.int8)
    return b"".join(scale.tobytes() + code.tobytes() for scale, code in zip(d, codes, strict=True))
