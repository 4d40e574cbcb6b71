"""LoHa: the update is the elementwise product of two low-rank matrices, and has a rank of up to r^2.

W' = W + (alpha / r) (A1 B1) o (A2 B2)

Source: Yeh et al. 2023, arXiv:2309.14859 (LyCORIS), after FedPara, arXiv:2108.06098.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import KIND_RULES
from .dense_weight import to_double
from .layer import AdapterLayer, IncompatibleUpdate, Part, Start, Update, device_of

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


@dataclass(frozen=True)
class LohaUpdate(Update):
    """Delta W = (alpha / r) (w1_a @ w1_b) o (w2_a @ w2_b). The shape of a is (out, r), of b (r, in)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None

    kind: ClassVar[str] = "loha"
    keys: ClassVar[Mapping[str, str]] = {**{f".hada_{name}": name for name in NAMES}, ".alpha": "alpha"}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> LohaUpdate | None:
        if not set(NAMES) <= parts.keys() <= {*NAMES, "alpha"} or any(parts[name].ndim != 2 for name in NAMES):
            return None
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        return cls(*(parts[name] for name in NAMES), alpha=alpha)

    @property
    def rank(self) -> int:
        return len(self.w1_b)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        a1, b1, a2, b2 = (to_double(getattr(self, name).to(weight.device)) for name in NAMES)
        return (a1 @ b1) * (a2 @ b2) * self.scale

    def applied(self, x: Tensor) -> Tensor:
        """Return (A1 B1 o A2 B2) x, computed as the diagonal of A1 (B1 diag(x) B2^T) A2^T."""
        a1, b1, a2, b2 = (getattr(self, name).to(x) for name in NAMES)
        return ((a1 @ ((b1 * x) @ b2.t())) * a2).sum(1) * self.scale

    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        tensors = {f".hada_{name}": getattr(self, name) for name in NAMES}
        return tensors if self.alpha is None else {**tensors, ".alpha": torch.tensor(float(self.alpha))}

    def rows(self, rows: slice) -> LohaUpdate:
        """Return the part for these rows, without the rank directions that only other parts of a fused file use."""
        w1_a, w2_a = self.w1_a[rows], self.w2_a[rows]
        used = w1_a.any(0) | w2_a.any(0)
        if not used.any():
            return replace(self, w1_a=w1_a, w2_a=w2_a)
        alpha = None if self.alpha is None else self.scale * int(used.sum())
        return LohaUpdate(w1_a[:, used], self.w1_b[used], w2_a[:, used], self.w2_b[used], alpha)

    def swap_halves(self) -> LohaUpdate:
        half = len(self.w1_a) // 2
        return replace(self, w1_a=self.w1_a.roll(half, 0), w2_a=self.w2_a.roll(half, 0))

    def fuse(self, parts: Sequence[Part], norms: Tensor) -> LohaUpdate:
        """Merge block by block: both products are block-wise, so the elementwise product is too."""
        pairs = [(rows, part) for rows, part in parts if isinstance(part, LohaUpdate)]
        wide = {side: torch.cat([getattr(part, f"{side}_b") for _, part in pairs]) for side in ("w1", "w2")}
        tall = {side: wide[side].new_zeros(len(norms), len(wide[side])) for side in wide}
        offset = 0
        for rows, part in pairs:
            for side in tall:
                tall[side][rows, offset : offset + part.rank] = getattr(part, f"{side}_a")
            offset += part.rank
        alpha = None if self.alpha is None else self.scale * offset
        return LohaUpdate(tall["w1"], wide["w1"], tall["w2"], wide["w2"], alpha)

    def layer(self, base: nn.Linear) -> AdapterLayer:
        layer = LohaLinear(base, self.rank, self.scale * self.rank)
        layer.load_update_(self, torch.zeros)
        return layer.requires_grad_(False)


class LohaLinear(AdapterLayer):
    """y = W x + b + s ((A1 B1) o (A2 B2)) x, with s = alpha / r.

    Initial values are as in LyCORIS: A1 is normal with standard deviation 0.1, B1 and B2 with 1, A2 is 0.
    """

    inits = KIND_RULES["loha"].inits
    network: ClassVar[Mapping[str, str]] = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'}
    update_type = LohaUpdate

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        device = device_of(base)
        edges = {"a": (base.out_features, rank), "b": (rank, base.in_features)}
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (
            nn.Parameter(torch.zeros(edges[name[-1]], device=device)) for name in NAMES
        )

    @property
    def file_alpha(self) -> float:
        return self.alpha

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        delta: Any = _Hadamard.apply(self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return y + F.linear(self.apply_dropout(x), (delta * (self.scale * self.strength)).to(x.dtype))

    @torch.no_grad()
    def start_(self, start: Start) -> None:
        for name, deviation in (("w1_b", 1.0), ("w1_a", 0.1), ("w2_b", 1.0)):
            parameter = getattr(self, name)
            parameter.copy_(torch.randn(parameter.shape, generator=start.generator) * deviation)
        self.w2_a.zero_()

    @torch.no_grad()
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        if not isinstance(update, LohaUpdate):
            raise IncompatibleUpdate("the file is not a LoHa; set kind to the file's kind")
        if update.rank != self.rank or update.scale != self.scale:
            raise IncompatibleUpdate(
                f"the file's rank is {update.rank} at scale {update.scale:g} and the run's {self.rank} at scale "
                f"{self.scale:g}; set rank to {update.rank} and alpha to {update.scale * update.rank:g}"
            )
        for name in NAMES:
            getattr(self, name).copy_(getattr(update, name))

    def update(self) -> LohaUpdate:
        return LohaUpdate(*(getattr(self, name).detach().cpu().float() for name in NAMES), alpha=self.alpha)


class _Hadamard(torch.autograd.Function):
    """(A1 B1) o (A2 B2). Saves the factors for the backward pass instead of the two (out, in) products."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a1, b1, a2, b2 = ctx.saved_tensors
        first, second = grads[0] * (a2 @ b2), grads[0] * (a1 @ b1)
        return first @ b1.t(), a1.t() @ first, second @ b2.t(), a2.t() @ second
