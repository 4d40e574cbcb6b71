"""One adapter file, checked before it replaces the old one.

universal: diffusers' names with the prefix `transformer.`, alpha / rank multiplied into B. Loads in ComfyUI, diffusers and peft.
comfyui: the original, fused names with the prefix `diffusion_model.`: A of q, k and v stacked, B block by block.
kohya: the same under `lora_unet_*`, with an alpha.
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
from .safetensors import data_sha256, header_bytes, tensor_bytes

PREFIX = "transformer."
PREFIXES: dict[str, Callable[[str], str]] = {
    "universal": lambda name: PREFIX + name,
    "comfyui": lambda name: f"diffusion_model.{name}",
    "kohya": kohya_name,
}
# Relative difference of what is read back, on a probe: sums in another order, and bf16's rounding of each factor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ExportedLora:
    """What was written, and read back. applied of num_keys keys fit the model: equal, or the export failed."""

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
    """Write an adapter, read it back, check it against the model, and only then put it in the place of the old file.

    The bytes depend on the weights, the metadata, dtype and form alone. fp32 is exact; bf16 halves the file and rounds each
    weight by up to 0.4 %.

    Args:
        layers: what inject_ returned, by full module name.
        transformer: the model that the file must fit.
        form: universal, comfyui or kohya: one of the kind's own formats.
        staging: where the file is made, see files.replace_atomic; folders of LoRAs are listed by other programs.

    Raises:
        RuntimeError: a key fits no module, or what was read differs from what was written; the old file is intact.
        OSError: as of files.write_atomic.
    """
    assert layers, "there is no LoRA"
    updates = {name: layer.update() for name, layer in layers.items()}
    by_name = updates if form == "universal" else fuse_updates(updates, transformer)
    named = {
        name: {
            PREFIXES[form](name) + end: _to_file_dtype(tensor, dtype)
            for end, tensor in update.tensors(form == "kohya").items()
        }
        for name, update in by_name.items()
    }
    tensors = {key: tensor for part in named.values() for key, tensor in part.items()}
    data = tensor_bytes(tensors)
    header = header_bytes(tensors, {**metadata, "sshs_model_hash": data_sha256(data)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(header + data)
        _check(temporary, {name: len(part) for name, part in named.items()}, updates, transformer, TOLERANCES[dtype])

    replace_atomic(path, write, staging)
    digest = hashlib.sha256(header + data).hexdigest()
    if sha256_of(path) != digest:
        raise RuntimeError(f"{path} does not hold what was written")
    return ExportedLora(digest, applied=len(tensors), num_keys=len(tensors))


def fuse_updates(updates: Mapping[str, Update], transformer: nn.Module) -> dict[str, Update]:
    """Updates by the original layout's names; those of layers that are one there become one.

    Raises:
        Misfit: the kind can't be fused.
        RuntimeError: a layer has no name there.
    """
    members: dict[str, list[tuple[Place, nn.Module, str]]] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, (nn.Linear, AdapterLayer)) and not name.endswith(".base"):
            try:
                place = original_place(name)
            except KeyError:
                continue
            members.setdefault(place.module, []).append((place, module, name))
    found: dict[str, Update] = {}
    named = set()
    for original, parts in members.items():
        inside = [(place, name) for place, _, name in parts if name in updates]
        named |= {name for _, name in inside}
        if not inside:
            continue
        first = updates[inside[0][1]]
        if inside[0][0].part is None:
            found[original] = first.swap_halves() if inside[0][0].is_swapped else first
            continue
        norms = torch.cat([_norms(module) for _, module, _ in sorted(parts, key=lambda part: part[0].part or 0)])
        rows = [(place.rows(first.shape[1]), updates[name]) for place, name in inside]
        found[original] = first.fuse(rows, norms)
    if named != updates.keys():
        raise RuntimeError(
            f"the LoRA is not saved: {sorted(updates.keys() - named)[0]} has no name in the original layout"
        )
    return found


def _norms(module: nn.Module) -> Tensor:
    base = module.base if isinstance(module, AdapterLayer) else module
    assert isinstance(base, nn.Linear)
    return row_norms(to_double(dense_weight(base))).float().cpu()


def _to_file_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU; a lone number such as alpha stays exact."""
    return tensor.detach().to("cpu", dtype if tensor.ndim else torch.float32)


def _check(
    file: Path, names: Mapping[str, int], written: Mapping[str, Update], transformer: nn.Module, tolerance: float
) -> None:
    """Every key is for a layer of the model that learnt, of that layer's shape, and does there what the adapter does.

    names: how many keys each name in the file has.
    """
    found, bad = match(transformer, read_lora(file))
    layers = {name: [module for module, _ in places] for name, places in file_names(transformer).items()}
    faults = {
        name for name in found.keys() | written.keys() if not _same(found.get(name), written.get(name), tolerance)
    }
    bad_names = {name for name in names if name in bad or faults & set(layers.get(name, [name]))}
    if bad_names or faults:
        applied = sum(count for name, count in names.items() if name not in bad_names)
        shown = ", ".join(sorted(faults | bad_names)[:3])
        raise RuntimeError(
            f"the LoRA is not saved: {applied} of {sum(names.values())} keys apply; not those of {shown}"
        )


def _same(found: Update | None, written: Update | None, tolerance: float) -> bool:
    if found is None:
        return False
    if written is None:  # rows of a fused weight that did not learn
        return found.is_zero()
    one, two = (update.applied(probe(found.shape[1])) for update in (found, written))
    return one.shape == two.shape and bool((one - two).norm() <= tolerance * two.norm())
