"""LoRA: the product of two low-rank matrices, added to the weight.

y = W x + b + (alpha / rank) B A x

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import KIND_RULES
from ..registry import load
from .dense_weight import dense_weight, to_double
from .initializers import gaussian, olora, orthogonal, pissa, uniform
from .layer import AdapterLayer, IncompatibleUpdate, Part, Start, Update, device_of, product_dtype

# Suffixes of a DoRA's norms of whole rows, of which the update is a small part: too much of it is lost in 16 bits.
ROW_NORMS = (".lora_magnitude_vector", ".dora_scale")


@dataclass(frozen=True)
class LoraPair(Update):
    """Delta W = up @ down, with alpha / rank included in up. With DoRA, the rows of W + up @ down are scaled as well.

    Args:
        down: (r, in).
        up: (out, r).
        magnitude: DoRA as peft stores it: the norm of each new row, (out,).
        ratio: DoRA as ComfyUI reads it: new weight = (W + up @ down) * ratio / norm of W's row, (out, 1).
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    ratio: Tensor | None = None

    kind: ClassVar[str] = "lora"
    keys: ClassVar[Mapping[str, str]] = {
        ".lora.down.weight": "down", ".lora.up.weight": "up",
        ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
        ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
        ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude", ".dora_scale": "ratio", ".alpha": "alpha",
    }  # fmt: skip

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> LoraPair | None:
        if not {"down", "up"} <= parts.keys() <= {"down", "up", "magnitude", "ratio", "alpha"}:
            return None
        down, up = parts["down"], parts["up"]
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            return None
        if "alpha" in parts:
            up = (up.float() * (float(parts["alpha"]) / down.shape[0])).to(up.dtype)
        magnitude, ratio = parts.get("magnitude"), parts.get("ratio")
        if ratio is not None and ratio.numel() != len(up):  # one value per column: an older LyCORIS format
            return None
        return cls(down, up, magnitude, None if ratio is None else ratio.reshape(-1, 1))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_dora(self) -> bool:
        return self.magnitude is not None or self.ratio is not None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        product = to_double(self.up.to(weight.device)) @ to_double(self.down.to(weight.device))
        if not self.is_dora:
            return product
        weight = to_double(weight)
        return (weight + product) * self.row_factors(weight) - weight

    def row_factors(self, weight: Tensor) -> Tensor:
        """Return the factor of each row of W + up @ down, (out, 1), fp64. weight: W, (out, in)."""
        weight = to_double(weight)
        if self.magnitude is not None:
            product = self.up.to(weight.device).double() @ self.down.to(weight.device).double()
            return self.magnitude.to(weight).reshape(-1, 1) / row_norms(weight + product)[:, None]
        assert self.ratio is not None
        return self.ratio.to(weight) / row_norms(weight)[:, None]

    def applied(self, x: Tensor) -> Tensor:
        y = self.up.to(x) @ (self.down.to(x) @ x)
        factors = self.ratio if self.ratio is not None else self.magnitude
        return y if factors is None else y * factors.to(x).flatten()

    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        if kohya:
            tensors = {
                ".lora_down.weight": self.down,
                ".lora_up.weight": self.up,
                ".alpha": torch.tensor(float(self.rank)),
            }
        else:
            tensors = {".lora_A.weight": self.down, ".lora_B.weight": self.up}
            if self.magnitude is not None:
                tensors[".lora_magnitude_vector"] = self.magnitude
        return tensors if self.ratio is None else {**tensors, ".dora_scale": self.ratio}

    def rows(self, rows: slice) -> LoraPair:
        selected = replace(
            self, up=self.up[rows],
            magnitude=None if self.magnitude is None else self.magnitude[rows],
            ratio=None if self.ratio is None else self.ratio[rows],
        )  # fmt: skip
        return selected.trim()

    def swap_halves(self) -> LoraPair:
        def swap(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.roll(len(self.up) // 2, 0)

        return replace(
            self, up=self.up.roll(len(self.up) // 2, 0), magnitude=swap(self.magnitude), ratio=swap(self.ratio)
        )

    def for_comfyui(self) -> LoraPair:
        """Return the update without the norms of peft's DoRA, where ComfyUI's own are there."""
        return self if self.ratio is None else replace(self, magnitude=None)

    def trim(self) -> LoraPair:
        """Remove the rank directions that add nothing: two thirds of them in a part split from a fused file."""
        used = self.up.any(0)
        return self if used.all() or not used.any() else replace(self, down=self.down[used], up=self.up[:, used])

    def fuse(self, parts: Sequence[Part], norms: Tensor) -> LoraPair:
        pairs = [(rows, pair) for rows, pair in parts if isinstance(pair, LoraPair)]
        down = torch.cat([pair.down for _, pair in pairs])
        up = down.new_zeros(len(norms), len(down))
        ratio = norms.to(up).reshape(-1, 1).clone() if self.is_dora else None
        offset = 0
        for rows, pair in pairs:
            up[rows, offset : offset + pair.rank] = pair.up
            offset += pair.rank
            if ratio is not None:
                assert pair.ratio is not None
                ratio[rows] = pair.ratio
        return LoraPair(down, up, ratio=ratio)

    def layer(self, base: nn.Linear) -> AdapterLayer:
        kind: type[LoraLinear] = load("adapter", "dora" if self.is_dora else "lora")
        layer = kind(base, self.rank, alpha=self.rank)
        layer.load_update_(self, torch.zeros)
        return layer.requires_grad_(False)


class LoraLinear(AdapterLayer):
    """y = W x + b + s B A x, with s = alpha / rank. s is multiplied into B before B is rounded, exactly as in the file.

    Initializations from the weight (pissa, olora) leave the base unchanged and train the difference:
    y = W x + b + s (B A - B0 A0) x = W x + b + s (B (A - A0) + (B - B0) A0) x.
    This trains like a modified base, starts at exactly 0, works on any base, and does not lose small changes next to
    large factors in bf16.

    Args:
        base: The layer, (in,) -> (out,).
        rank: r, of A (r, in) and B (out, r).
        alpha: The update is scaled by alpha / rank.
    """

    inits = KIND_RULES["lora"].inits
    update_type = LoraPair

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.lora_A0: Tensor | None
        self.lora_B0: Tensor | None
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        self.base_keeps_start = False  # loftq: B0 A0 corrects the quantized base: applied, but not saved

    @property
    def file_rank(self) -> int:
        return self.rank if self.lora_A0 is None else 2 * self.rank

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 2 and x.is_contiguous():  # one view of x and one of y, in place of seven and their gradients
            return self.forward(x.flatten(0, -2)).view(*x.shape[:-1], self.out_features)
        y = self.base(x)
        if self.strength == 0:
            return self._add_start(y, x, 1.0) if self.corrects_base else y
        return self.add_update(y, self.apply_dropout(x), self.strength)

    def add_update(self, y: Tensor, x: Tensor, strength: float) -> Tensor:
        """Return y + strength * s B A x. y: (..., out), x: (..., in)."""
        if self.working is not None and strength == 1.0:
            return self._add(y, x, *self.working)
        if strength != 1.0:
            y = self._add_start(y, x, 1.0 - strength)
        down, up = self.factors(moved_from_start=not self.base_keeps_start)
        return self._add(y, x, down.to(x.dtype), self._scaled(up, strength).to(x.dtype))

    def _add_start(self, y: Tensor, x: Tensor, share: float) -> Tensor:
        """Return y + share * s B0 A0 x with init loftq, whose start corrects the base and is no part of the update; else y."""
        if not self.base_keeps_start or self.lora_A0 is None or self.lora_B0 is None:
            return y
        return self._add(y, x, self.lora_A0.to(x.dtype), self._scaled(self.lora_B0, share).to(x.dtype))

    def _scaled(self, up: Tensor, strength: float) -> Tensor:
        factor = self.scale * strength
        return up if factor == 1.0 else up * factor

    def _add(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = F.linear(x, down)
        # addmm reads y once instead of twice for a product and a sum.
        if y.ndim == 2:
            return torch.addmm(y, inner, up.t())
        return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), up.t()).view_as(y)

    def working_factors(self) -> tuple[torch.dtype, Sequence[tuple[Tensor, float]]] | None:
        dtype = product_dtype(self.base)
        has_own_start = self.lora_A0 is not None and not self.base_keeps_start
        if has_own_start or self.lora_A.dtype == dtype:
            return None
        return dtype, ((self.lora_A, 1.0), (self.lora_B, self.scale))

    @property
    def is_joinable(self) -> bool:
        has_dropout = self.dropout is not None and self.dropout.rate > 0
        return type(self).forward is LoraLinear.forward and self.working_factors() is not None and not has_dropout

    def factors(self, moved_from_start: bool = True) -> tuple[Tensor, Tensor]:
        """Return A and B or, if there are initial factors A0 and B0, two factors of B A - B0 A0."""
        if self.lora_A0 is None or self.lora_B0 is None or not moved_from_start:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_A - self.lora_A0, self.lora_A0])
        return down, torch.cat([self.lora_B, self.lora_B - self.lora_B0], dim=1)

    def parts_of_base(self) -> frozenset[str]:
        return frozenset() if self.lora_A0 is None else frozenset({"lora_A", "lora_B"})

    @torch.no_grad()
    def rounded_(self, before: Mapping[str, Tensor]) -> None:
        """Count the update from the rounded factors: that of the rounding would be as large as 0.1 % of the weight."""
        if self.lora_A0 is not None and self.lora_B0 is not None:
            self.lora_A0.copy_(self.lora_A)
            self.lora_B0.copy_(self.lora_B)

    @torch.no_grad()
    def start_(self, start: Start) -> None:
        if start.init in ("pissa", "olora", "loftq"):
            self._start_from_weight_(start)
        elif start.init == "orthogonal":
            a, b = orthogonal(self.rank, self.out_features, self.in_features, start.generator)
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        else:  # eva sets its directions later, after the layer has processed data
            draw = gaussian if start.init == "gaussian" else uniform
            self.lora_A.copy_(draw(self.lora_A.shape, start.generator))

    def _start_from_weight_(self, start: Start) -> None:
        if start.init == "loftq" and not self.is_quantized:  # there is no quantization error to correct
            self.lora_A.copy_(uniform(self.lora_A.shape, start.generator))
            return
        weight = dense_weight(self.base).to(start.device or self.lora_A.device).float()
        if start.init == "loftq":
            assert start.clean is not None, "loftq needs the weights before quantization"
            weight = start.clean.to(weight) - weight
            self.base_keeps_start = True
        rank = min(self.rank, *weight.shape)
        if start.init == "olora":
            a, b = olora(weight, rank)
        else:
            a, b = pissa(weight, rank, self.scale, start.iterations, start.generator)
        self.lora_A[:rank].copy_(a)
        self.lora_B[:, :rank].copy_(b)
        self.lora_A0, self.lora_B0 = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    @torch.no_grad()
    def init_along_(self, directions: Tensor) -> None:
        """Set the first rows of A to these directions, (up to r, in): the eva initialization. Keep the other rows."""
        self.lora_A[: len(directions)].copy_(directions)

    @torch.no_grad()
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        pair = self.fitting(update)
        if pair.is_dora:
            raise IncompatibleUpdate("the file is a DoRA; set kind to dora")
        self._load_factors_(pair, fill)

    def fitting(self, update: Update) -> LoraPair:
        """Return the update as a pair whose rank is at most this layer's.

        Raises:
            IncompatibleUpdate: The update is of another kind, or its rank is higher.
        """
        if not isinstance(update, LoraPair):
            raise IncompatibleUpdate(f"the file contains {update.kind} weights; set kind to {update.kind}")
        pair = update if update.rank <= self.rank else update.trim()
        if pair.rank > self.rank:
            raise IncompatibleUpdate(
                f"the file's rank is {pair.rank} and the run's is {self.rank}; set rank to {pair.rank} or more"
            )
        return pair

    def _load_factors_(self, pair: LoraPair, fill: Callable[[torch.Size], Tensor]) -> None:
        self.lora_A.copy_(fill(self.lora_A.shape))
        self.lora_A[: pair.rank].copy_(pair.down)
        self.lora_B.zero_()
        self.lora_B[:, : pair.rank].copy_(pair.up.float() / self.scale if self.scale != 1 else pair.up)

    def update(self) -> LoraPair:
        down, up = self.factors()
        return LoraPair(down.detach().cpu().float(), (up.detach() * self.scale).cpu().float())


def row_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, (out,); never 0."""
    return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
