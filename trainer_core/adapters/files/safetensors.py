"""Write safetensors files deterministically. The safetensors package writes metadata in random order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ...storage import safetensors_header as tensor_header

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytearray:
    """Return the data section: the bytes of each tensor in row-major order, sorted by name."""
    data = bytearray()
    for name in sorted(tensors):  # not joined: that would hold all parts beside the whole
        data += _raw(tensors[name])
    return data


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length and header of a file whose data section is tensor_bytes(tensors)."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return tensor_header.header_bytes(header)


def data_sha256(data: bytes | bytearray) -> str:
    """Return kohya's `sshs_model_hash`. It covers only the data section, so metadata can change."""
    return hashlib.sha256(data).hexdigest()


def _raw(tensor: Tensor) -> memoryview | bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
