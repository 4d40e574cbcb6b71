"""The scale of each layer of a LoRA file: what programs apply, and what was meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.files.load import ALPHA, DOWNS
from ...adapters.files.peft_config import alpha_of
from ..reader import LoraReader

FACTORS = (*DOWNS, ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b")  # whose first edge is the rank, in the order that counts
OF_KOHYA = (".lora_down.weight", ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b")  # whose tools always write an alpha
LARGEST, SMALLEST = (
    64.0,
    1 / 1024,
)  # scales beyond these were not trained: kohya's and LyCORIS' defaults give 1/128 to 4


@dataclass(frozen=True)
class Scale:
    """The scale of a layer.

    Attributes:
        rank: Rank of the factors, 0 if they have none.
        applied: Factor that ComfyUI multiplies the product by. It reads alpha from the layer's tensors alone.
        meant: The factor that the file's own values give.
        fault: What is wrong, in words; "" for nothing.
        is_repaired: Whether a repaired file differs in this.
    """

    rank: int
    applied: float
    meant: float
    fault: str = ""
    is_repaired: bool = False


def scale_of(lora: LoraReader, module: str, part: Mapping[str, Tensor]) -> Scale:
    """Return the scale of a layer. part: its tensors by suffix."""
    rank = next((part[end].shape[0] for end in FACTORS if end in part), 0)
    if not rank:
        return Scale(0, 1.0, 1.0)
    stated = _stated_scale(lora.metadata)
    if ALPHA in part:
        return _with_alpha(part[ALPHA], rank, stated)
    in_header = alpha_of(lora.header_alpha, module, rank) if lora.header_alpha else None
    if in_header is not None and any(end in part for end in DOWNS):
        if in_header == rank:
            return Scale(rank, 1.0, 1.0)
        fault = (
            "alpha stands in the header alone, which ComfyUI does not read: it applies 1 instead of "
            f"{in_header / rank:g}"
        )
        return Scale(rank, 1.0, in_header / rank, fault, True)
    if not any(end in part for end in OF_KOHYA):
        return Scale(rank, 1.0, 1.0)
    if stated is not None and stated != 1:
        fault = f"alpha is missing, and the metadata gives a scale of {stated:g}: ComfyUI applies 1"
        return Scale(rank, 1.0, stated, fault, True)
    return Scale(rank, 1.0, 1.0, "" if stated else "alpha is missing: every program applies a scale of 1")


def _with_alpha(alpha: Tensor, rank: int, stated: float | None) -> Scale:
    value = float(alpha) if alpha.numel() == 1 else math.nan
    repaired = stated or 1.0
    source = "the metadata's scale" if stated else "alpha = rank"
    if not math.isfinite(value):
        return Scale(
            rank, value, repaired, f"alpha is not a number; {source} ({repaired:g}) is used in its place", True
        )
    if value == 0:
        return Scale(
            rank,
            0.0,
            repaired,
            f"alpha is 0, so nothing is applied; {source} ({repaired:g}) is used in its place",
            True,
        )
    scale = value / rank
    if not SMALLEST <= scale <= LARGEST:
        return Scale(rank, scale, scale, f"alpha {value:g} at rank {rank} is far off: a scale of {scale:g}")
    return Scale(rank, scale, scale)


def _stated_scale(metadata: Mapping[str, str]) -> float | None:
    """Return alpha / rank as kohya's metadata gives it, None if it does not say."""
    try:
        alpha, rank = float(metadata["ss_network_alpha"]), float(metadata["ss_network_dim"])
        scale = alpha / rank
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return scale if math.isfinite(scale) and scale > 0 else None


def with_scale(part: Mapping[str, Tensor], scale: Scale) -> dict[str, Tensor]:
    """Return a layer's tensors with the alpha that was meant."""
    alpha = torch.tensor(scale.meant * scale.rank, dtype=torch.float64)
    needs_alpha = scale.rank and (ALPHA in part or scale.meant != 1)
    return {**part, **({ALPHA: alpha} if needs_alpha else {})}
