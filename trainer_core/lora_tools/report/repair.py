"""Write a LoRA file anew, so that ComfyUI and diffusers load all of it with the scale that was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ...adapters.files.grouping import update_types
from ...adapters.files.keys import layers_of
from ...adapters.files.load import build_update, is_finite, part_of
from ...adapters.layer import IncompatibleUpdate, Update
from ...errors import UserError
from ..reader import LoraReader
from ..writer import Written, edited_metadata, write_lora
from .alpha import with_scale
from .examine import LoraReport

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def repair(lora: LoraReader, report: LoraReport, path: Path) -> Written:
    """Write the repaired file.

    Layers that are no layers of the model, that have values that are not finite, that do nothing, or that the file has
    twice, are left out. Names become diffusers' and alpha is multiplied into the factors.

    Args:
        lora: The LoRA.
        report: Its report.
        path: The file to write.
    Raises:
        UserError: There is nothing to save, or the file belongs to another model.
    """
    return write_lora(path, sound_layers(lora, report), metadata_of_repair(lora, report), dtype_of(report))


def metadata_of_repair(lora: LoraReader, report: LoraReport) -> dict[str, str]:
    """Return the metadata of the repaired file."""
    return edited_metadata("doctor", [(lora, "")], repaired=[f.text for f in report.findings if f.is_repaired])


def dtype_of(report: LoraReport) -> torch.dtype:
    """Return the dtype of the file; fp32 if alpha changes the factors by other than a power of two, which rounds them."""
    names = report.dtypes.keys() - {"I64", "F64"}
    scales = {layer.scale.meant for layer in report.layers}
    is_exact = all(scale > 0 and torch.tensor(scale).log2().frac() == 0 for scale in scales)
    own = [DTYPES[name] for name in names if name in DTYPES]
    matrices = [dtype for dtype in own if dtype != torch.float32]
    return matrices[0] if is_exact and len(set(matrices)) == 1 and _is_mostly(report, matrices[0]) else torch.float32


def _is_mostly(report: LoraReport, dtype: torch.dtype) -> bool:
    """Return whether fewer tensors than layers have another dtype: scalars such as alpha may be fp32."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    return sum(count for other, count in report.dtypes.items() if other != name) <= len(report.layers)


def sound_layers(lora: LoraReader, report: LoraReport) -> Iterator[tuple[str, Update]]:
    """Yield the layers of the repaired file, see repair."""
    if not report.base.is_ours or lora.faults or not report.layers or len(lora.groups.adapters - {""}) > 1:
        raise UserError.at(lora.name, f"can't be repaired: {report.findings[0].text}")
    written: set[str] = set()
    wrong_shapes = set(report.base.misshapen)
    for layer in report.layers:
        is_sound = layer.is_complete and layer.is_finite and not layer.is_dead
        if not is_sound or layer.module in report.base.unknown:
            continue
        update = build_update(with_scale(lora.part(layer.module), layer.scale), update_types())
        assert update is not None and is_finite(update)
        for name, piece in _pieces(layer.module, update):
            if name not in written and name not in wrong_shapes:
                written.add(name)
                yield name, piece


def _pieces(module: str, update: Update) -> Iterator[tuple[str, Update]]:
    """Yield the update by diffusers' layers or, if this kind can't be split, by its original name."""
    layers = layers_of(module)
    try:
        pieces = [(name, part_of(update, place)) for name, place in layers]
    except IncompatibleUpdate:
        pieces = [(layers[0][1].module, update)]
    for name, piece in pieces:
        if len(pieces) == 1 or not piece.is_zero():  # rows of a fused layer that were not trained
            yield name, piece
