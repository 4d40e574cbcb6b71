"""Quantized weights of ComfyUI and bitsandbytes, decoded value by value as their formats describe them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.storage.packed.decode_packed import E2M1, decode, empty_stored, hadamard, stored_of
from chroma_trainer.trainer_core.storage.packed.packed_header import Unreadable, packed_weights

ROWS, COLUMNS = 130, 96  # more rows than a tile of scales, and an odd number of groups
DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"
}  # fmt: skip


def text(**values: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def draws(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def described(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Any] | None = None):
    shapes = {key: (DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    return packed_weights(shapes, lambda key: tensors[key].numpy().tobytes(), layers)


def decoded(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    packed = described(tensors)["x.weight"]
    stored = stored_of(packed, tensors["x.weight"], tensors.__getitem__)
    empty = empty_stored(packed)
    assert {name: (part.shape, part.dtype) for name, part in empty.items()} == {
        name: (part.shape, part.dtype) for name, part in stored.items()
    }
    return decode(packed.type, stored, packed.shape, dtype)


def tile(scales: torch.Tensor) -> torch.Tensor:
    """Place each scale by cuBLAS' formula: row r and column c are at 512 t + 16 (r % 32) + 4 (r % 128 // 32) + c % 4."""
    rows, columns = scales.shape
    across = math.ceil(columns / 4)
    flat = torch.zeros(math.ceil(rows / 128) * across * 512, dtype=scales.dtype)
    for r in range(rows):
        for c in range(columns):
            block = r // 128 * across + c // 4
            flat[512 * block + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return flat.reshape(math.ceil(rows / 128) * 128, across * 4)


def e4m3(code: int) -> float:
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2**-6 if not exponent else (1 + mantissa / 8) * 2 ** (exponent - 7))


def test_mxfp8():
    codes = draws(ROWS, COLUMNS, high=120)
    scales = draws(ROWS, COLUMNS // 32, low=110, high=140)
    weight = decoded({
        "x.weight": codes.to(torch.uint8).view(torch.float8_e4m3fn), "x.weight_scale": tile(scales.to(torch.uint8)),
        "x.comfy_quant": text(format="mxfp8"),
    })  # fmt: skip
    for r, c in ((0, 0), (33, 31), (127, 32), (128, 95), (129, 64)):
        assert weight[r, c].item() == e4m3(int(codes[r, c])) * 2.0 ** (int(scales[r, c // 32]) - 127)


def test_nvfp4():
    codes, scales = draws(ROWS, COLUMNS // 2), draws(ROWS, COLUMNS // 16, low=1, high=126)
    weight = decoded({
        "x.weight": codes.to(torch.uint8), "x.weight_scale": tile(scales.to(torch.uint8)).view(torch.float8_e4m3fn),
        "x.weight_scale_2": torch.tensor(0.75), "x.comfy_quant": text(format="nvfp4"),
    })  # fmt: skip
    for r, c in ((0, 0), (0, 1), (40, 17), (128, 95), (129, 64)):
        byte = int(codes[r, c // 2])
        code = byte & 15 if c % 2 else byte >> 4
        assert weight[r, c].item() == E2M1[code] * (0.75 * e4m3(int(scales[r, c // 16])))


@pytest.mark.parametrize("whole", [True, False])
def test_int8(whole):
    codes = draws(ROWS, COLUMNS, low=-128, high=128)
    scale = torch.tensor(0.01) if whole else torch.rand(ROWS, 1)
    tensors = {
        "x.weight": codes.to(torch.int8),
        "x.weight_scale": scale,
        "x.comfy_quant": text(format="int8_tensorwise"),
    }
    assert torch.equal(decoded(tensors), codes.float() * scale)
    assert torch.equal(decoded(tensors, torch.bfloat16), (codes.float() * scale).bfloat16())


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("nested", [False, True])
def test_rotated(size, nested):
    """What is rotated and stored exactly comes back: 8 bits, and 4 bits."""
    options = {"convrot": True, "convrot_groupsize": size}
    form = {"params": options} if nested else options
    original = draws(ROWS, COLUMNS, low=-4, high=4).float() / size
    rotated = (original.unflatten(1, (-1, size)) @ hadamard(size).T).flatten(1)
    exact = rotated * size**1.5  # integers
    assert torch.equal(exact, exact.round())
    scale = torch.full((ROWS, 1), size**-1.5)
    half = exact.round() / 2**3 if size == 16 else exact.round() / 2
    eight = {
        "x.weight": exact.to(torch.int8),
        "x.weight_scale": scale,
        "x.comfy_quant": text(format="int8_tensorwise", **form),
    }
    assert exact.abs().max() < 128
    torch.testing.assert_close(decoded(eight), original)
    codes = half.clamp(-8, 7).round().int()
    packed = (codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)
    four = {"x.weight": packed, "x.weight_scale": scale[:, 0], "x.comfy_quant": text(format="convrot_w4a4", **form)}
    torch.testing.assert_close(decoded(four), ((codes * scale).unflatten(1, (-1, size)) @ hadamard(size)).flatten(1))


def test_the_rotation_is_orthogonal_and_regular():
    for size in (4, 16, 256):
        matrix = hadamard(size)
        assert torch.equal(matrix, matrix.T) and torch.equal(matrix @ matrix, torch.eye(size))
        assert torch.equal(matrix.sum(0), torch.ones(size))  # every row has the same sum


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested):
    """Its scales in fp32, or as codes with scales of their own."""
    codes, table = draws(ROWS * COLUMNS // 2, 1), torch.linspace(-1, 1, 16)
    blocks = ROWS * COLUMNS // 32
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 32, "shape": [ROWS, COLUMNS], "dtype": "bfloat16"}
    tensors = {"x.weight": codes.to(torch.uint8), "x.weight.quant_map": table}
    absmax = torch.rand(blocks)
    if nested:
        inner, outer, outer_table = draws(blocks), torch.rand(math.ceil(blocks / 256)), torch.rand(256)
        tensors |= {"x.weight.nested_absmax": outer, "x.weight.nested_quant_map": outer_table}
        state |= {"nested_blocksize": 256, "nested_offset": 0.25}
        absmax = torch.stack([outer_table[code] * outer[i // 256] + 0.25 for i, code in enumerate(inner)])
        tensors["x.weight.absmax"] = inner.to(torch.uint8)
    else:
        tensors["x.weight.absmax"] = absmax
    weight = decoded(tensors | {"x.weight.quant_state.bitsandbytes__nf4": text(**state)})
    for place in (0, 1, 31, 32, 4097, ROWS * COLUMNS - 1):
        byte = int(codes[place // 2])
        code = byte & 15 if place % 2 else byte >> 4
        assert weight.flatten()[place] == table[code] * absmax[place // 32]


EIGHT = {"x.weight": torch.zeros(4, 64, dtype=torch.int8), "x.weight_scale": torch.ones(4)}
FAULTS = {
    "unknown": ({"format": "w3a16"}, {}, "'w3a16', an unknown format, in x"),
    "no format": ({}, {}, "'', an unknown format, in x"),
    "scale missing": ({"format": "int8_tensorwise"}, {"x.weight_scale": None}, "int8_tensorwise, but x has no weight_scale"),
    "scale cut": (
        {"format": "int8_tensorwise"}, {"x.weight_scale": torch.ones(3)},
        "int8_tensorwise, but x.weight_scale has 3 values instead of 1 or 4",
    ),
    "dtype": ({"format": "mxfp8"}, {}, "mxfp8, but x.weight is stored as I8 instead of F8_E4M3"),
    "rotation": (
        {"format": "int8_tensorwise", "convrot": True}, {},
        "int8_tensorwise, but x.weight has 64 columns, which groups of 256 do not divide",
    ),
    "size": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}, {},
        "a format with rotations of 32 values, which is no power of 4",
    ),
    "three dimensions": (
        {"format": "int8_tensorwise"}, {"x.weight": torch.zeros(2, 2, 4, dtype=torch.int8)},
        "int8_tensorwise, but x.weight has 3 dimensions instead of 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_named(name):
    form, changes, message = FAULTS[name]
    tensors = {key: tensor for key, tensor in (EIGHT | changes).items() if tensor is not None}
    with pytest.raises(Unreadable) as error:
        described(tensors | {"x.comfy_quant": text(**form)})
    assert str(error.value) == message


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b"[" * 5000])
def test_damaged_descriptions_are_named(raw):
    tensors = EIGHT | {"x.comfy_quant": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}
    with pytest.raises(Unreadable, match="a format whose description is damaged, in x"):
        described(tensors)


def test_descriptions_in_the_metadata():
    packed = described(EIGHT, {"x": {"format": "int8_tensorwise"}, "gone": {"format": "nvfp4"}})
    assert [packed["x.weight"].type, len(packed)] == ["int8", 1]
    assert described({"x.weight": torch.zeros(4, 4)}, {"x": {"format": "float8_e4m3fn"}}) == {}
