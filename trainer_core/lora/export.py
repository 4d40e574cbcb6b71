"""One LoRA file that loads everywhere: ComfyUI, diffusers and peft.

diffusers' names with the prefix `transformer.`, `lora_A.weight` and `lora_B.weight`, alpha / rank multiplied into B, no
`.alpha`. Measured exact in all three (tests/lora/test_export.py, tests/comfyui).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import replace_atomic, sha256_of
from .inject import LoraLinear
from .read import LoraPair, read_lora
from .tensor_file import data_sha256, header_bytes, tensor_bytes

PREFIX = "transformer."


@dataclass(frozen=True)
class ExportedLora:
    """What was written, and read back. applied of num_keys keys fit the model: equal, or the export failed."""

    sha256: str
    applied: int
    num_keys: int


def export_lora(
    layers: Mapping[str, LoraLinear],
    transformer: nn.Module,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> ExportedLora:
    """Write a LoRA, read it back, check it against the model, and only then put it in the place of the old file.

    The bytes depend on the weights, the metadata and dtype alone. fp32 is exact; bf16 halves the file and rounds each
    weight by up to 0.4 %.

    Args:
        layers: what inject_ returned, by full module name.
        transformer: the model that the file must fit.

    Raises:
        RuntimeError: a key fits no module, or what was read differs from what was written; the old file is intact.
        OSError: as of files.write_atomic.
    """
    assert layers, "there is no LoRA"
    tensors = universal_tensors(layers, dtype)
    data = tensor_bytes(tensors)
    header = header_bytes(tensors, {**metadata, "sshs_model_hash": data_sha256(data)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(header + data)
        _check(temporary, layers, transformer, tensors)

    replace_atomic(path, write)
    digest = hashlib.sha256(header + data).hexdigest()
    if sha256_of(path) != digest:
        raise RuntimeError(f"{path} does not hold what was written")
    return ExportedLora(digest, applied=len(tensors), num_keys=len(tensors))


def universal_tensors(layers: Mapping[str, LoraLinear], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The file's tensors, on the CPU."""
    tensors = {}
    for name, layer in layers.items():
        up = layer.lora_B.detach() * layer.scale
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().to("cpu", dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.to("cpu", dtype)
    return tensors


def _check(
    file: Path, layers: Mapping[str, LoraLinear], transformer: nn.Module, written: Mapping[str, Tensor]
) -> None:
    """Every key names a layer of the model, with that layer's shapes, and holds what the adapter holds."""
    modules = dict(transformer.named_modules())
    pairs = read_lora(file)
    fitting = [name for name, pair in pairs.items() if _fits(modules.get(name), pair)]
    faults = [name for name in pairs.keys() | layers.keys() if name not in fitting]
    faults += [name for name in fitting if not _holds(pairs[name], written, name)]
    num_keys = 2 * len(layers)
    if faults:
        applied = num_keys - 2 * len(set(faults))
        shown = ", ".join(sorted(faults)[:3])
        raise RuntimeError(f"the LoRA is not saved: {applied} of {num_keys} keys apply; not those of {shown}")


def _fits(module: nn.Module | None, pair: LoraPair) -> bool:
    if not isinstance(module, (LoraLinear, nn.Linear)):
        return False
    return (pair.up.shape[0], pair.down.shape[1]) == (module.out_features, module.in_features)


def _holds(pair: LoraPair, written: Mapping[str, Tensor], name: str) -> bool:
    return torch.equal(pair.down, written[f"{PREFIX}{name}.lora_A.weight"]) and torch.equal(
        pair.up, written[f"{PREFIX}{name}.lora_B.weight"]
    )
