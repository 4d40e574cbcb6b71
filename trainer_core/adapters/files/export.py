"""Export an adapter to one file. The file is checked before it replaces the previous one.

Formats:
    universal: diffusers' names with the prefix `transformer.`; alpha / rank is multiplied into B. Loads in ComfyUI,
        diffusers and peft.
    comfyui: the original, fused names with the prefix `diffusion_model.`; A of q, k and v is stacked, B is block-wise.
    kohya: the same with the prefix `lora_unet_`, and with an alpha.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...storage.atomic import replace_atomic, sha256_of
from ..dense_weight import dense_weight, to_double
from ..layer import AdapterLayer, Update, probe
from ..lora import row_norms
from .keys import Place, original_place
from .load import file_names, kohya_name, match, read_lora
from .safetensors import data_sha256, header_bytes, tensor_bytes, to_file_dtype

PREFIX = "transformer."
PREFIXES: dict[str, Callable[[str], str]] = {
    "universal": lambda name: PREFIX + name,
    "comfyui": lambda name: f"diffusion_model.{name}",
    "kohya": kohya_name,
}
# Maximum relative difference of the file's update on a probe vector, due to summation order and bf16 rounding of
# factors.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ExportedLora:
    """The result of an export: the file was written, read back and checked.

    Attributes:
        sha256: Digest of the file.
        applied: Number of keys that match the model; equals num_keys, otherwise the export fails.
        num_keys: Number of keys in the file.
    """

    sha256: str
    applied: int
    num_keys: int


def export_lora(
    layers: Mapping[str, AdapterLayer],
    transformer: nn.Module,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    form: str = "universal",
    staging: Path | None = None,
) -> ExportedLora:
    """Write an adapter to a temporary file, read it back, check it against the model, then replace the previous file.

    The bytes depend only on the weights, the metadata, dtype and form. fp32 is exact; bf16 halves the file size and
    rounds each weight by up to 0.4 %.

    Args:
        layers: The result of inject_, by full module name.
        transformer: The model that the file must match.
        path: The file to write.
        metadata: Entries of the file's header.
        dtype: Dtype of the saved tensors.
        form: universal, comfyui or kohya: one of the kind's own formats.
        staging: Folder of the temporary file, see storage.atomic.replace_atomic. Other programs list LoRA folders.
    Returns:
        The digest and the number of keys.
    Raises:
        RuntimeError: A key matches no module, or the file's content differs from the adapter. The old file is
            unchanged.
        OSError: See storage.atomic.write_atomic.
    """
    assert layers, "there are no adapter layers"
    updates = {name: layer.update() for name, layer in layers.items()}
    by_name = updates if form == "universal" else fuse_updates(updates, transformer)
    tensors_by_module = {
        name: {
            PREFIXES[form](name) + end: to_file_dtype(tensor, dtype)
            for end, tensor in update.tensors(form == "kohya").items()
        }
        for name, update in by_name.items()
    }
    tensors = {key: tensor for part in tensors_by_module.values() for key, tensor in part.items()}
    data = tensor_bytes(tensors)
    header = header_bytes(tensors, {**metadata, "sshs_model_hash": data_sha256(data)})

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(header)
            stream.write(data)
        _check(
            temporary,
            {name: len(part) for name, part in tensors_by_module.items()},
            updates,
            transformer,
            TOLERANCES[dtype],
        )

    replace_atomic(path, write, staging)
    digest = hashlib.sha256(header)
    digest.update(data)
    if sha256_of(path) != digest.hexdigest():
        raise RuntimeError(f"the content of {path} differs from what was written")
    return ExportedLora(digest.hexdigest(), applied=len(tensors), num_keys=len(tensors))


def fuse_updates(updates: Mapping[str, Update], transformer: nn.Module) -> dict[str, Update]:
    """Rename updates to the original layout and merge the updates of layers that are fused there.

    Raises:
        IncompatibleUpdate: This kind of adapter can't be merged.
        RuntimeError: A layer has no name in the original layout.
    """
    members: dict[str, list[tuple[Place, nn.Module, str]]] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, (nn.Linear, AdapterLayer)) and not name.endswith(".base"):
            try:
                place = original_place(name)
            except KeyError:
                continue
            members.setdefault(place.module, []).append((place, module, name))
    fused: dict[str, Update] = {}
    exported = set()
    for original, parts in members.items():
        trained_parts = [(place, name) for place, _, name in parts if name in updates]
        exported |= {name for _, name in trained_parts}
        if not trained_parts:
            continue
        first = updates[trained_parts[0][1]]
        if trained_parts[0][0].part is None:
            whole = first.swap_halves() if trained_parts[0][0].is_swapped else first
            fused[original] = whole.for_comfyui()
            continue
        norms = torch.cat([_norms(module) for _, module, _ in sorted(parts, key=lambda part: part[0].part or 0)])
        rows = [(place.rows(first.shape[1]), updates[name]) for place, name in trained_parts]
        fused[original] = first.fuse(rows, norms)
    if exported != updates.keys():
        raise RuntimeError(
            f"the LoRA is not saved: {sorted(updates.keys() - exported)[0]} has no name in the original layout"
        )
    return fused


def _norms(module: nn.Module) -> Tensor:
    base = module.base if isinstance(module, AdapterLayer) else module
    assert isinstance(base, nn.Linear)
    return row_norms(to_double(dense_weight(base))).float().cpu()


def _check(
    file: Path, names: Mapping[str, int], updates: Mapping[str, Update], transformer: nn.Module, tolerance: float
) -> None:
    """Raise RuntimeError unless every key matches a trained layer and its shape, and has the adapter's effect there.

    Args:
        file: The file to check.
        names: Number of keys for each module name in the file.
        updates: The adapter's updates by module name.
        transformer: The model.
        tolerance: Maximum relative difference on a probe vector.
    """
    read_updates, misfits = match(transformer, read_lora(file))
    layers = {name: [module for module, _ in places] for name, places in file_names(transformer).items()}
    differing = {
        name
        for name in read_updates.keys() | updates.keys()
        if not _is_same(read_updates.get(name), updates.get(name), tolerance)
    }
    bad_names = {name for name in names if name in misfits or differing & set(layers.get(name, [name]))}
    if bad_names or differing:
        applied = sum(count for name, count in names.items() if name not in bad_names)
        examples = ", ".join(sorted(differing | bad_names)[:3])
        raise RuntimeError(
            f"the LoRA is not saved: {applied} of {sum(names.values())} keys apply; not those of {examples}"
        )


def _is_same(read: Update | None, expected: Update | None, tolerance: float) -> bool:
    if read is None:
        return False
    if expected is None:  # rows of a fused weight that are not trained
        return read.is_zero()
    one, two = (update.applied(probe(read.shape[1])) for update in (read, expected))
    return one.shape == two.shape and bool((one - two).norm() <= tolerance * two.norm())
