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
Read = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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
    read: Read = as_it_is,
) -> tuple[str, int]:
    """Write the transformer, and replace an earlier file at this path.

    Args:
        path: The file.
        transformer: The model. Layers may be trained ones (trained_layer.py).
        base: The files that the training started from.
        metadata: Texts of the header.
        trained: Tensors that take the place of the model's own, by the parameter's name.
        staging: Folder of the temporary file, see storage.atomic.replace_atomic.
        read: Returns the whole of a tensor of the model.
    Returns:
        The file's SHA-256, and the number of its tensors.
    Raises:
        RuntimeError: A name or a shape differs from the base model's, or the disk returns other bytes than were
            written. An earlier file is unchanged.
    """
    tensors = _planned(transformer, base, trained or {}, read)
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        digest = write_tensors(temporary, tensors, metadata)
        _check(temporary, original_form(base))
        if sha256_of(temporary) != digest:
            raise RuntimeError(f"the content of {path} differs from what was written")

    replace_atomic(path, write, staging)
    return digest, len(tensors)


def help_to_write(transformer: Any, base: Weights, trained: Mapping[str, Callable[[], Tensor]], read: Read) -> None:
    """Make the tensors of the file, in its order, while rank 0 writes it: all ranks make each together."""
    for _, planned in sorted(_planned(transformer, base, trained, read).items()):
        planned.make()


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


def _planned(
    transformer: Any, base: Weights, trained: Mapping[str, Callable[[], Tensor]], read: Read
) -> dict[str, Planned]:
    """Return the tensors of the file by their original names. Each is made when its turn comes."""
    members: dict[str, list[tuple[Place, str, Tensor]]] = {}
    for key, tensor in transformer.state_dict().items():
        name = key.replace(".base.", ".")  # of a trained layer
        original, place = _original(base, name)
        members.setdefault(original, []).append((place, name, tensor))
    unknown = trained.keys() - {name for parts in members.values() for _, name, _ in parts}
    assert not unknown, f"no weights of the model: {sorted(unknown)[:NUM_EXAMPLES]}"
    names = {_as_in(base, original): parts for original, parts in members.items()}
    tensors = {name: _join(sorted(part, key=lambda p: p[0].part or 0), trained, read) for name, part in names.items()}
    return {**tensors, **{name: _marker(base, name) for name in base.keys if 0 in base.shape(name)}}


def _original(base: Weights, name: str) -> tuple[str, Place]:
    """Return a parameter's original name. Some of Radiance's layers have the same name in both layouts."""
    if is_original(base) and _as_in(base, name) in base.entries:
        return name, Place(name.rpartition(".")[0])
    return original_parameter(name)


def _as_in(base: Weights, original: str) -> str:
    """Return the name as the base file writes it: the scale of a norm is called `scale` or `weight`."""
    others = (original.replace(".scale", ".weight"), original.replace("norm.weight", "norm.scale"))
    if not is_original(base) or original in base.entries:
        return original
    return next((name for name in others if name in base.entries), original)


def _marker(base: Weights, name: str) -> Planned:
    """Return an empty tensor, whose presence in the file says something about the model."""
    tensor = base.read(name)
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _join(parts: list[tuple[Place, str, Tensor]], trained: Mapping[str, Callable[[], Tensor]], read: Read) -> Planned:
    first = parts[0][2]
    shape = (sum(tensor.shape[0] for _, _, tensor in parts), *first.shape[1:])

    def make() -> Tensor:
        pieces = []
        for place, name, own in parts:
            tensor = trained[name]() if name in trained else read(own)
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
