"""Merge, resize and scale LoRAs by their factors, one layer at a time, with the error of each result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..adapters.layer import IncompatibleUpdate, Update
from ..adapters.loha import LohaUpdate
from ..adapters.lokr import LokrUpdate
from ..adapters.lora import LoraPair
from ..errors import UserError
from .block_strengths import strengths, unmatched
from .factors import Decomposition, as_product, decompose, rank_of_energy
from .presets import PRESETS
from .progress import Progress
from .reader import LoraReader, require_lora
from .report.examine import name_of_kind

Layers = Iterator[tuple[str, Update]]
ALTERNATIVE = (
    "apply it to the base model in ComfyUI, save the model with Save Checkpoint or Model Save, and use lora extract "
    "on both"
)


@dataclass(frozen=True)
class Cut:
    """How updates are reduced to a lower rank.

    Args:
        rank: The largest rank, 0 for no limit.
        energy: Share of the squared norm of each layer that its rank must hold, 0 for no such limit. With a rank, the
            lower of both counts.
    """

    rank: int = 0
    energy: float = 0.0

    @property
    def is_exact(self) -> bool:
        return not self.rank and not self.energy

    def rank_of(self, values: Tensor) -> int:
        """Return the rank for these singular values, at least 1."""
        rank = min(self.rank or len(values), len(values))
        return min(rank, rank_of_energy(values, self.energy)) if self.energy else rank


@dataclass
class Losses:
    """What was lost by cuts, summed up over the layers.

    Attributes:
        ranks: Rank of each layer before and after.
        square: Squared norm of all updates.
        lost: Squared norm of what was cut off.
        worst: Relative error of the layer that lost most, and its name.
    """

    ranks: list[tuple[int, int]] = field(default_factory=list)
    square: float = 0.0
    lost: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def add(self, name: str, square: float, lost: float, before: int, after: int) -> None:
        """Add a layer: the squared norm of its update, what was cut off of it, and its ranks."""
        self.ranks.append((before, after))
        self.square, self.lost = self.square + square, self.lost + lost
        self.worst = max(self.worst, ((lost / square) ** 0.5 if square else 0.0, name))

    @property
    def error(self) -> float:
        """Norm of what was cut off, relative to the norm of all updates."""
        return (self.lost / self.square) ** 0.5 if self.square else 0.0

    def text(self) -> str:
        """Return the ranks and the error in words."""
        if not self.ranks:
            return ""
        before, after = ([pair[i] for pair in self.ranks] for i in (0, 1))
        text = f"rank {_span(before)} -> {_span(after)}, relative error {self.error:.3g}"
        return text + (f"; the most in {self.worst[1]} ({self.worst[0]:.3g})" if self.worst[0] > 0 else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "error": self.error,
            "worst_layer": self.worst[1],
            "worst_error": self.worst[0],
            "ranks": [after for _, after in self.ranks],
        }


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def resize(lora: LoraReader, cut: Cut, losses: Losses, progress: Progress) -> Layers:
    """Yield every layer's best approximation of a lower rank (Eckart and Young 1936).

    A LoHa or LoKr becomes a LoRA. A DoRA keeps the scales of its rows; its error is that of the product of its factors.

    Args:
        lora: The LoRA.
        cut: The rank. An exact cut removes directions that hold nothing.
        losses: Filled in.
        progress: Called after each layer.
    """
    require_lora(lora)
    for done, name in enumerate(lora.places):
        update = lora.layer(name)
        dora = update if isinstance(update, LoraPair) and update.is_dora else None
        pair = replace(dora, magnitude=None, ratio=None) if dora else _product(lora, name, update)
        small = _cut(name, decompose(pair.up, pair.down), pair.rank, cut, losses)
        yield name, replace(dora, down=small.down, up=small.up) if dora else small
        progress(done + 1, len(lora.places))


def _cut(name: str, parts: Decomposition, before: int, cut: Cut, losses: Losses) -> LoraPair:
    rank = cut.rank_of(parts.values)
    squares = parts.values.square()
    losses.add(name, float(squares.sum()), float(squares[rank:].sum()), before, rank)
    return parts.cut(rank)


def _product(lora: LoraReader, name: str, update: Update) -> LoraPair:
    try:
        return as_product(update)
    except IncompatibleUpdate as error:
        kind = name_of_kind(update)
        raise UserError.at(lora.name, f"{name} is a {kind} layer: {error}; {ALTERNATIVE}") from error


def merge(loras: Sequence[tuple[LoraReader, float]], cut: Cut, losses: Losses, progress: Progress) -> Layers:
    """Yield the sum of LoRAs, each multiplied by its strength.

    Without a cut the sum is exact: factors are stacked, so ranks add up. A LoHa of rank r has rank r^2 then.

    Args:
        loras: The LoRAs and their strengths.
        cut: Rank of the result.
        losses: Filled in.
        progress: Called after each layer.
    """
    for lora, _ in loras:
        require_lora(lora)
    names = list(dict.fromkeys(name for lora, _ in loras for name in lora.places))
    for done, name in enumerate(names):
        pairs = [
            (_product(lora, name, lora.layer(name)), strength)
            for lora, strength in loras
            if strength and name in lora.places
        ]
        if pairs:  # else the layer is only in files of strength 0
            yield name, _sum(name, pairs, cut, losses)
        progress(done + 1, len(names))


def _sum(name: str, pairs: Sequence[tuple[LoraPair, float]], cut: Cut, losses: Losses) -> LoraPair:
    shapes = {pair.shape for pair, _ in pairs}
    if len(shapes) > 1:
        raise UserError.at(
            name,
            f"has different shapes in the files ({', '.join(map(str, sorted(shapes)))}); they belong to different "
            "models",
        )
    down = torch.cat([pair.down.float() for pair, _ in pairs])
    up = torch.cat([pair.up.float() * strength for pair, strength in pairs], dim=1)
    if cut.is_exact:
        losses.ranks.append((len(down), len(down)))
        return LoraPair(down, up)
    return _cut(name, decompose(up, down), len(down), cut, losses)


def scale_blocks(lora: LoraReader, preset: str, rules: str, strength: float, progress: Progress) -> Layers:
    """Yield the layers with their strengths changed; those of strength 0 are left out.

    Args:
        lora: The LoRA.
        preset: A name in presets.PRESETS. Its rules may match nothing.
        rules: Further rules, see block_strengths.strengths. Each must match a layer.
        strength: Multiplies all of them.
        progress: Called after each layer.
    """
    require_lora(lora)
    values = strengths(lora.places, f"{PRESETS[preset]}\n{rules}")
    if missing := unmatched(lora.places, rules):
        examples = ", ".join(list(lora.places)[:: max(1, len(lora.places) // 3)][:3])
        raise UserError.at(
            "blocks", f"{missing[0]!r} matches none of the {len(values)} layers of {lora.name}, such as {examples}"
        )
    for done, name in enumerate(lora.places):
        if factor := values[name] * strength:
            yield name, _scale(lora, name, lora.layer(name), factor)
        progress(done + 1, len(lora.places))


def _scale(lora: LoraReader, name: str, update: Update, factor: float) -> Update:
    if factor == 1:
        return update
    try:
        return multiply(update, factor)
    except IncompatibleUpdate as error:
        kind = name_of_kind(update)
        raise UserError.at(lora.name, f"{name} is a {kind} layer: {error}; use 0 or 1") from error


@singledispatch
def multiply(update: Update, factor: float) -> Update:
    """Return an update that changes the weight by `factor` times as much.

    Raises:
        IncompatibleUpdate: This kind can't.
    """
    raise IncompatibleUpdate("it depends on the base model, so its strength can't be stored in the file")


@multiply.register
def _(update: LoraPair, factor: float) -> LoraPair:
    if update.is_dora:
        raise IncompatibleUpdate("it rescales rows of the base model, so its strength can't be stored in the file")
    return replace(update, up=update.up.float() * factor)


@multiply.register
def _(update: LohaUpdate, factor: float) -> LohaUpdate:
    return replace(update, w1_a=update.w1_a.float() * factor)


@multiply.register
def _(update: LokrUpdate, factor: float) -> LokrUpdate:
    if update.w1 is not None:
        return replace(update, w1=update.w1.float() * factor)
    assert update.w1_a is not None
    return replace(update, w1_a=update.w1_a.float() * factor)
