"""Extract a LoRA from two models: the difference of each layer, as its best approximation of a low rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.initializers import principal
from ..adapters.lora import LoraPair
from ..config.model import ModelConfig
from ..errors import UserError, quoted
from ..models.flux_lineage import is_original, original_layout, shape_of
from ..models.loading.header_check import GUIDANCE, part_fault
from ..models.loading.locate import find_part, folder_of_part, is_hub_id
from ..models.loading.weights import Kind, Weights, same_names
from ..models.lora_targets import Linears
from ..registry import load, names
from ..seeds import generator
from ..storage.atomic import sha256_of
from .factors import Decomposition
from .progress import Progress
from .reader import EDIT
from .surgery import Cut, Layers, Losses

ITERATIONS = 6  # of the randomized range finder; 2 already find what a trained difference has
MAX_RANK = 256  # where only an energy is given


@dataclass(frozen=True)
class ModelWeights:
    """The linear layers of a transformer on disk, read one at a time.

    Attributes:
        name: For messages.
        family: "chroma", "flux" or "radiance".
        layers: Diffusers' names of all layers that a LoRA may change.
        read: Returns the weight of a layer, fp32, (out, in).
        files: The files.
        flavour: The variant that its labels name.
    """

    name: str
    family: str
    layers: tuple[str, ...]
    read: Callable[[str], Tensor]
    files: tuple[Path, ...]
    flavour: str = ""


def open_model(source: str, field: str) -> ModelWeights:
    """Open a transformer: a single file in either layout, a diffusers folder, or a Hugging Face repository.

    Raises:
        UserError: It is no Chroma or Flux.1 transformer.
    """
    path = Path(source)
    if not path.exists() and not is_hub_id(source):
        raise UserError.at(
            field,
            f"{quoted(source)} does not exist; use a .safetensors file, a diffusers folder or a Hugging Face repository",
        )
    faults = []
    for family in names("family"):
        transformer = _resolve(path) if path.exists() else source
        model = ModelConfig(family=family, flavour="", repo="", transformer_file=transformer)
        try:
            return open_config(model, path.name or source)
        except UserError as error:
            faults.append(error.problems[0].message)
    raise UserError.at(field, f"{quoted(source)} is no Chroma or Flux.1 transformer: {faults[0]}")


def open_config(model: ModelConfig, name: str = "") -> ModelWeights:
    """Open the transformer of a model.

    Args:
        model: The model.
        name: Name for messages; "" for that of its file or repository.
    Raises:
        UserError: It is not on this machine, or of another family.
    """
    kind: Kind = load("family", model.family).transformer_kind
    files = find_part(model, "transformer").files
    if fault := part_fault(files, "transformer", model.family):
        raise UserError.at(files[0].name, fault)
    weights = Weights(files, kind, mapped=False)
    return _open(name or Path(model.transformer_file or model.repo).name, model.family, weights)


def _resolve(path: Path) -> str:
    return str(folder_of_part(path, "transformer") if path.is_dir() else path.resolve())


def _open(name: str, family: str, weights: Weights) -> ModelWeights:
    linears: Linears = load("linears", family)
    width = shape_of(weights, "context_embedder.weight", "txt_in.weight")[0]
    layout = original_layout(width) if is_original(weights) else same_names

    flavour = {"chroma": "hd", "radiance": "radiance"}.get(family, "")
    flavour = flavour or ("dev" if any(key in weights.entries for key in GUIDANCE) else "schnell")

    def source(layer: str) -> tuple[str, slice] | None:
        keys, rows = layout(f"{layer}.weight")
        key = next((key for key in keys if key in weights.entries), None)
        return (key, rows) if key else None

    def read(layer: str) -> Tensor:
        place = source(layer)
        assert place is not None
        return weights.read(*place, torch.float32)

    blocks = [
        f"{kind}.{index}.{layer}"
        for kind, original, layers in (
            ("transformer_blocks", "double_blocks", linears.double),
            ("single_transformer_blocks", "single_blocks", linears.single),
        )
        for index in range(max(weights.count(kind), weights.count(original)))
        for layer in layers
    ]
    return ModelWeights(
        name, family, tuple(layer for layer in [*blocks, *linears.ends] if source(layer)), read, weights.files, flavour
    )


def extract(
    base: ModelWeights,
    tuned: ModelWeights,
    cut: Cut,
    losses: Losses,
    progress: Progress,
    device: torch.device | None = None,
) -> Layers:
    """Yield the difference of two models, layer by layer. Layers that are equal are left out.

    So are those that differ by being rounded to bf16 alone, as a model of fp32 that was saved in bf16.

    Args:
        base: The original model.
        tuned: The model that was trained from it.
        cut: The rank. With an energy alone, ranks are limited to 256.
        losses: Filled in.
        progress: Called after each layer.
        device: Where the decompositions run.
    Raises:
        UserError: The models have different layers or shapes.
    """
    if base.family != tuned.family or set(base.layers) != set(tuned.layers):
        raise UserError.at(
            tuned.name, f"is a {tuned.family} transformer with {len(tuned.layers)} layers, and {base.name} is " f"{base.family} with "
            f"{len(base.layers)}; they are not of one model",
        )  # fmt: skip
    for done, name in enumerate(base.layers):
        before, after = base.read(name), tuned.read(name)
        if before.shape != after.shape:
            raise UserError.at(
                name, f"has shape {tuple(before.shape)} in {base.name} and {tuple(after.shape)} in {tuned.name}"
            )
        if not (torch.equal(before, after) or torch.equal(before.bfloat16().float(), after)):
            yield name, _decompose(name, after.sub_(before).to(device or "cpu"), cut, losses)
        progress(done + 1, len(base.layers))


def _decompose(name: str, difference: Tensor, cut: Cut, losses: Losses) -> LoraPair:
    full = min(difference.shape)
    limit = min(full, cut.rank or MAX_RANK)
    left, values, right = principal(difference, limit, ITERATIONS, generator(0, "extract", name))
    square, sums = float(difference.double().square().sum()), values.double().square().cumsum(0)
    rank = min(limit, int((sums < cut.energy * square).sum()) + 1) if cut.energy else limit
    losses.add(name, square, max(0.0, square - float(sums[rank - 1])), full, rank)
    pair = Decomposition(left, values, right).cut(rank)
    return LoraPair(pair.down.cpu(), pair.up.cpu())


def model_metadata(base: ModelWeights, tuned: ModelWeights, progress: Progress) -> dict[str, str]:
    """Return the metadata of an extracted LoRA: the base model's labels, and the digests of all files of both models.

    Args:
        base: The original model.
        tuned: The trained model.
        progress: Called after each file; all bytes are read.
    """
    files = [(model, file) for model in (base, tuned) for file in model.files]
    digests: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for done, (model, file) in enumerate(files):
        digests["base" if model is base else "tuned"][file.name] = sha256_of(file)
        progress(done + 1, len(files))
    labels = load("family", base.family)().labels(ModelConfig(family=base.family, flavour=base.flavour, repo=""))
    parents = [{"name": model.name, "files": digests[role]} for role, model in (("base", base), ("tuned", tuned))]
    return {**labels, EDIT: json.dumps({"operation": "lora extract", "parents": parents}, sort_keys=True)}
