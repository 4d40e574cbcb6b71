"""Our writer of safetensors against the safetensors package."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.safetensors import header_bytes, tensor_bytes
from safetensors import safe_open
from safetensors.torch import load_file

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.randn(4, 2).to(torch.bfloat16),
    "c.half": torch.randn(3).half(),
    "d": torch.randn(2, 2, dtype=torch.float64),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
}


def write(path, tensors, metadata):
    path.write_bytes(header_bytes(tensors, metadata) + tensor_bytes(tensors))


def test_the_package_reads_what_we_write(tmp_path):
    write(tmp_path / "file.safetensors", TENSORS, {"title": '▁ ünïcode "quoted"', "a": "1"})
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == {"title": '▁ ünïcode "quoted"', "a": "1"}


@pytest.mark.parametrize("metadata", [{}, {"a": "1"}])
def test_the_data_begins_at_a_multiple_of_eight(tmp_path, metadata):
    header = header_bytes(TENSORS, metadata)
    assert len(header) % 8 == 0 and len(header) == 8 + int.from_bytes(header[:8], "little")
    write(tmp_path / "file.safetensors", TENSORS, metadata)
    load_file(tmp_path / "file.safetensors")


def test_the_order_of_what_is_given_does_not_matter():
    shuffled = dict(reversed(TENSORS.items()))
    assert header_bytes(TENSORS, {"a": "1", "b": "2"}) == header_bytes(shuffled, {"b": "2", "a": "1"})
    assert tensor_bytes(TENSORS) == tensor_bytes(shuffled)
