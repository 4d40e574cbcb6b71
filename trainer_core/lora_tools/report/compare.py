"""How far two LoRAs do the same: cosines of their updates and overlap of their main directions, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...adapters.layer import IncompatibleUpdate
from ...adapters.lora import LoraPair
from ...errors import UserError
from ..block_strengths import block_of
from ..factors import as_product, decompose, inner, norm, overlap
from ..progress import Progress
from ..reader import LoraReader, require_lora

SIMILAR, OPPOSED = 0.5, -0.2  # cosines


@dataclass(frozen=True)
class SharedLayer:
    """One layer that both LoRAs change.

    Attributes:
        name: Diffusers' name.
        cosine: Of both updates as vectors: 1 equal up to a factor, 0 unrelated, -1 opposed.
        overlap: Share of the main directions in common, see factors.overlap.
        inner: Sum of the products of all elements.
        norms: Frobenius norms.
    """

    name: str
    cosine: float
    overlap: float
    inner: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """The comparison of two LoRAs.

    Attributes:
        names: Of the files.
        layers: Layers that both change.
        only: Number of layers that only the first or only the second changes.
        cosine: Of all of both updates, layers that one lacks included.
        overlap: Mean over the shared layers.
    """

    names: tuple[str, str]
    layers: tuple[SharedLayer, ...]
    only: tuple[int, int]
    cosine: float
    overlap: float

    def as_json(self) -> dict[str, Any]:
        return {
            "files": list(self.names),
            "cosine": self.cosine,
            "overlap": self.overlap,
            "shared_layers": len(self.layers),
            "only_in_first": self.only[0],
            "only_in_second": self.only[1],
            "layers": [{"name": layer.name, "cosine": layer.cosine, "overlap": layer.overlap} for layer in self.layers],
        }

    def text(self) -> str:
        """Return the comparison as lines of text."""
        lines = [
            f"{self.names[0]} and {self.names[1]}",
            f"  cosine      {self.cosine:+.3f} over all layers: {_in_words(self.cosine)}",
            f"  overlap     {self.overlap:.0%} of the main directions of the {len(self.layers)} layers that both "
            "change",
        ]
        if any(self.only):
            lines.append(f"  only in one {self.only[0]} layers of the first, {self.only[1]} of the second")
        by_block: dict[str, list[SharedLayer]] = {}
        for layer in self.layers:
            by_block.setdefault(block_of(layer.name), []).append(layer)
        blocks = sorted(((_joint_cosine(part), block) for block, part in by_block.items()), reverse=True)
        if len(blocks) > 1:
            lines.append("  most alike  " + ", ".join(f"{block} ({value:+.2f})" for value, block in blocks[:3]))
            lines.append("  least alike " + ", ".join(f"{block} ({value:+.2f})" for value, block in blocks[:-4:-1]))
        return "\n".join(lines)


def _joint_cosine(layers: list[SharedLayer]) -> float:
    squares = [sum(layer.norms[i] ** 2 for layer in layers) for i in (0, 1)]
    total = (squares[0] * squares[1]) ** 0.5
    return sum(layer.inner for layer in layers) / total if total else 0.0


def _in_words(cosine: float) -> str:
    if cosine >= SIMILAR:
        return "they do much the same; together they do it twice as strongly"
    return "they work against each other" if cosine <= OPPOSED else "they change the model in different ways"


def compare(first: LoraReader, second: LoraReader, progress: Progress = lambda done, total: None) -> Comparison:
    """Compare two LoRAs by their factors, one layer at a time.

    Raises:
        UserError: One is no LoRA of Chroma or Flux, or of a kind that depends on the base model (DoRA, OFT).
    """
    for lora in (first, second):
        require_lora(lora)
    names = list(dict.fromkeys([*first.places, *second.places]))
    layers: list[SharedLayer] = []
    squares = [0.0, 0.0]
    for done, name in enumerate(names):
        pairs = [_product(lora, name) if name in lora.places else None for lora in (first, second)]
        norms = [norm(pair) if pair else 0.0 for pair in pairs]
        squares = [total + value**2 for total, value in zip(squares, norms, strict=True)]
        if pairs[0] and pairs[1]:
            layers.append(_compare_layer(name, pairs[0], pairs[1], (norms[0], norms[1])))
        progress(done + 1, len(names))
    total = (squares[0] * squares[1]) ** 0.5
    shared = {layer.name for layer in layers}
    return Comparison(
        (first.name, second.name), tuple(layers), (len(first.places.keys() - shared), len(second.places.keys() - shared)),
        sum(layer.inner for layer in layers) / total if total else 0.0,
        sum(layer.overlap for layer in layers) / len(layers) if layers else 0.0,
    )  # fmt: skip


def _product(lora: LoraReader, name: str) -> LoraPair:
    try:
        return as_product(lora.layer(name))
    except IncompatibleUpdate as error:
        raise UserError.at(lora.name, f"{name} can't be compared: {error}") from error


def _compare_layer(name: str, one: LoraPair, two: LoraPair, norms: tuple[float, float]) -> SharedLayer:
    if one.shape != two.shape:
        raise UserError.at(
            name, f"has shape {one.shape} in one file and {two.shape} in the other; they belong to different models"
        )
    product, total = inner(one, two), norms[0] * norms[1]
    shared = overlap(decompose(one.up, one.down), decompose(two.up, two.down)) if total else 0.0
    return SharedLayer(name, product / total if total else 0.0, shared, product, norms)
