"""The header and the blocks of GGUF files, against files and decoders written from the format's description."""

from __future__ import annotations

import struct

import numpy
import pytest
import torch
from chroma_trainer.trainer_core.storage.bounded_files import Unusable
from chroma_trainer.trainer_core.storage.gguf.blocks import DECODERS, decode
from chroma_trainer.trainer_core.storage.gguf.header import gguf_header_of

from .writer import SIZES, decode_block, random_blocks, text, write_gguf


@pytest.mark.parametrize("kind", DECODERS)
def test_blocks_are_decoded_bit_for_bit(kind):
    rows, width = 5, 512
    values, size = SIZES[kind]
    raw = random_blocks(kind, rows, width)
    wanted = [value for at in range(0, len(raw), size) for value in decode_block(kind, raw[at : at + size])]
    codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(rows, width // values * size)
    result = decode(kind, codes, torch.float32)
    assert torch.equal(result, torch.tensor(wanted).reshape(rows, width)) and result.std() > 0
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(decode(kind, codes, dtype), result.to(dtype))


def test_large_weights_are_decoded_in_parts(monkeypatch):
    codes = torch.frombuffer(bytearray(random_blocks("Q4_K", 7, 512)), dtype=torch.uint8).reshape(7, -1)
    whole = decode("Q4_K", codes, torch.float32)
    monkeypatch.setattr("chroma_trainer.trainer_core.storage.gguf.blocks.CHUNK_VALUES", 1024)
    assert torch.equal(decode("Q4_K", codes, torch.float32), whole)
    assert decode("Q4_K", codes.to("meta"), torch.float32).shape == (7, 512)


TENSORS = {
    "double_blocks.0.img_mod.lin.weight": ("Q4_0", (4, 64), random_blocks("Q4_0", 4, 64)),
    "img_in.bias": ("F32", (3,), numpy.arange(3, dtype=numpy.float32).tobytes()),
    "enc.blk.2.ffn_gate.weight": ("Q8_0", (2, 32), random_blocks("Q8_0", 2, 32)),
    "enc.blk.0.attn_rel_b.weight": ("F16", (2, 3), bytes(12)),
    "token_embd.weight": ("BF16", (2, 2), bytes(8)),
}  # fmt: skip


def test_the_header(tmp_path):
    more = text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("猫") + text("")
    more += (
        text("numbers")
        + struct.pack("<IIQ", 9, 6, 2)
        + bytes(8)
        + text("general.alignment")
        + struct.pack("<II", 4, 32)
    )
    path = write_gguf(tmp_path / "a.gguf", TENSORS, more=more, num_more=3)
    entries, start = gguf_header_of(path)
    assert list(entries) == [
        "double_blocks.0.img_mod.lin.weight", "img_in.bias", "encoder.block.2.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight",
    ]  # fmt: skip
    assert entries["double_blocks.0.img_mod.lin.weight"] == {
        "dtype": "Q4_0",
        "shape": [4, 64],
        "data_offsets": [0, 4 * 2 * 18],
    }
    begin, end = entries["img_in.bias"]["data_offsets"]
    raw = path.read_bytes()[start + begin : start + end]
    assert numpy.frombuffer(raw, numpy.float32).tolist() == [0, 1, 2]


def test_every_truncation_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "a.gguf", TENSORS).read_bytes()
    for size in [*range(0, 400, 7), len(whole) - 1]:
        (tmp_path / "b.gguf").write_bytes(whole[:size])
        with pytest.raises(Unusable, match=r"ends within|not a GGUF file"):
            gguf_header_of(tmp_path / "b.gguf")


def test_mutated_headers_raise_nothing_else(tmp_path):
    whole = bytearray(write_gguf(tmp_path / "a.gguf", TENSORS).read_bytes())
    draw = numpy.random.default_rng(0)
    for _ in range(400):
        raw = bytearray(whole)
        for at in draw.integers(0, 420, 3):
            raw[at] = draw.integers(0, 256)
        (tmp_path / "b.gguf").write_bytes(raw)
        try:
            entries, start = gguf_header_of(tmp_path / "b.gguf")
        except Unusable:
            continue
        assert all(start + entry["data_offsets"][1] <= len(raw) for entry in entries.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"PK\x03\x04" + raw[4:], "is not a GGUF file"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "is GGUF of version 1; versions 2 and 3 can be read"),
        (lambda raw: raw[:8] + struct.pack("<Q", 1 << 40) + raw[16:], "it is damaged"),
    ],
)
def test_wrong_files_are_named(tmp_path, change, message):
    path = write_gguf(tmp_path / "a.gguf", TENSORS)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Unusable, match=message):
        gguf_header_of(path)


def test_a_split_model_is_refused(tmp_path):
    more = text("split.count") + struct.pack("<IH", 2, 3)
    with pytest.raises(Unusable, match="is one part of a model that was split"):
        gguf_header_of(write_gguf(tmp_path / "a.gguf", TENSORS, more=more, num_more=1))
