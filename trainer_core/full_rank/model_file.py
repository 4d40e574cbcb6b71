"""Write a whole transformer as one file under its original names, as ComfyUI, BFL and lodestones have it, in bf16.

Tensors are written one by one, so that the model is never in RAM a second time. The file is checked against the base
model's before it replaces another one: each name and each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.files.keys import Place, original_parameter
from ..adapters.files.safetensors import Planned, write_tensors
from ..config.model import ModelConfig
from ..models.flux_lineage import is_original
from ..models.loading.locate import find_part
from ..models.loading.weights import Weights
from ..storage.atomic import replace_atomic, sha256_of
from ..storage.safetensors_header import METADATA, header_of

FILE_DTYPE = torch.bfloat16
NUM_EXAMPLES = 3
Form = dict[str, tuple[int, ...]]  # names and shapes


def base_weights(model: ModelConfig, family: Any) -> Weights:
    """Return the files of a model's transformer. Only their headers are read."""
    return Weights(find_part(model, "transformer").files, family.transformer_kind)


def write_transformer(
    path: Path,
    transformer: Any,
    base: Weights,
    metadata: Mapping[str, str],
    trained: Mapping[str, Callable[[], Tensor]] | None = None,
    staging: Path | None = None,
) -> tuple[str, int]:
    """Write the transformer, and replace an earlier file at this path.

    Args:
        path: The file.
        transformer: The model. Layers may be trained ones (full_rank/linear.py).
        base: The files that the training started from.
        metadata: Texts of the header.
        trained: Tensors that take the place of the model's own, by the parameter's name.
        staging: Folder of the temporary file, see storage.atomic.replace_atomic.
    Returns:
        The file's SHA-256, and the number of its tensors.
    Raises:
        RuntimeError: A name or a shape differs from the base model's, or the disk returns other bytes than were
            written. An earlier file is unchanged.
    """
    tensors = _planned(transformer, base, trained or {})
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        digest = write_tensors(temporary, tensors, metadata)
        _check(temporary, original_form(base))
        if sha256_of(temporary) != digest:
            raise RuntimeError(f"the content of {path} differs from what was written")

    replace_atomic(path, write, staging)
    return digest, len(tensors)


def original_form(base: Weights) -> Form:
    """Return the names and shapes that a model's tensors have in the original layout, from the headers of its files."""
    if is_original(base):
        return {name: base.shape(name) for name in base.keys}
    form: Form = {}
    for name in base.keys:
        original, shape = original_parameter(name)[0], base.shape(name)
        rows = form[original][0] if original in form else 0
        form[original] = (rows + shape[0], *shape[1:])
    return form


def _planned(transformer: Any, base: Weights, trained: Mapping[str, Callable[[], Tensor]]) -> dict[str, Planned]:
    """Return the tensors of the file by their original names. Each is made when its turn comes."""
    members: dict[str, list[tuple[Place, str, Tensor]]] = {}
    for key, tensor in transformer.state_dict().items():
        name = key.replace(".base.", ".")  # of a trained layer
        original, place = original_parameter(name)
        members.setdefault(original, []).append((place, name, tensor))
    unknown = trained.keys() - {name for parts in members.values() for _, name, _ in parts}
    assert not unknown, f"no weights of the model: {sorted(unknown)[:NUM_EXAMPLES]}"
    names = {_as_in(base, original): parts for original, parts in members.items()}
    return {name: _join(sorted(parts, key=lambda part: part[0].part or 0), trained) for name, parts in names.items()}


def _as_in(base: Weights, original: str) -> str:
    """Return the name as the base file writes it. Newer files call the scale of a norm `weight`."""
    newer = original.replace(".scale", ".weight")
    return newer if is_original(base) and original not in base.entries and newer in base.entries else original


def _join(parts: list[tuple[Place, str, Tensor]], trained: Mapping[str, Callable[[], Tensor]]) -> Planned:
    first = parts[0][2]
    shape = (sum(tensor.shape[0] for _, _, tensor in parts), *first.shape[1:])

    def make() -> Tensor:
        pieces = []
        for place, name, own in parts:
            tensor = trained[name]() if name in trained else own
            piece = tensor.detach().to(FILE_DTYPE).cpu()
            pieces.append(piece.roll(len(piece) // 2, 0) if place.is_swapped else piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Planned(FILE_DTYPE, shape, make)


def _check(file: Path, expected: Form) -> None:
    """Raise RuntimeError unless a file has exactly these names, each with its shape."""
    header, _ = header_of(file)
    form = {name: tuple(entry["shape"]) for name, entry in header.items() if name != METADATA}
    wrong = sorted(name for name in form.keys() | expected.keys() if form.get(name) != expected.get(name))
    if wrong:
        examples = ", ".join(
            f"{name} ({form.get(name)} instead of {expected.get(name)})" for name in wrong[:NUM_EXAMPLES]
        )
        raise RuntimeError(f"the model is not saved: {len(wrong)} of {len(expected)} tensors differ: {examples}")
