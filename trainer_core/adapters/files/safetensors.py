"""Write safetensors files deterministically. The safetensors package writes metadata in random order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...storage import safetensors_header as tensor_header

DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytearray:
    """Return the data section: the bytes of each tensor in row-major order, sorted by name."""
    data = bytearray()
    for name in sorted(tensors):  # not joined: that would hold all parts beside the whole
        data += raw_bytes(tensors[name])
    return data


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length and header of a file whose data section is tensor_bytes(tensors)."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in sorted(tensors):
        header[name], start = header_entry(tensors[name], start)
    return tensor_header.header_bytes(header)


def header_entry(tensor: Tensor, start: int) -> tuple[dict[str, object], int]:
    """Return a tensor's entry in the header, and where its bytes end. start: where they start in the data section."""
    end = start + tensor.numel() * tensor.element_size()
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}, end


@dataclass(frozen=True)
class Planned:
    """A tensor of a file that is written: its form, and a function that returns it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def plan_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Planned]:
    """Return tensors that exist already as tensors of a file."""
    return {name: Planned(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> str:
    """Write a file tensor by tensor, so that only one of them is in RAM at a time. Return the file's SHA-256."""
    forms = {name: torch.empty(item.shape, dtype=item.dtype, device="meta") for name, item in tensors.items()}
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def write(data: Any) -> None:
            stream.write(data)
            digest.update(data)

        write(header_bytes(forms, metadata))
        for name in sorted(tensors):
            tensor = tensors[name].make()
            assert (tensor.dtype, tuple(tensor.shape)) == (tensors[name].dtype, tensors[name].shape), name
            write(raw_bytes(tensor))
    return digest.hexdigest()


def data_sha256(data: bytes | bytearray) -> str:
    """Return kohya's `sshs_model_hash`. It covers only the data section, so metadata can change."""
    return hashlib.sha256(data).hexdigest()


def to_file_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert for the file, on the CPU. Scalars such as alpha stay fp32."""
    return tensor.detach().to("cpu", dtype if tensor.ndim else torch.float32)


def raw_bytes(tensor: Tensor) -> memoryview | bytes:
    """Return the bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
