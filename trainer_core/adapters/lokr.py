"""LoKr: the update is a Kronecker product, which has a high rank with few parameters.

W' = W + s kron(W1, W2), where W1 and W2 may each be a product of two low-rank matrices.

Source: Yeh et al. 2023, arXiv:2309.14859 (LyCORIS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import KIND_RULES, AdapterConfig
from .dense_weight import to_double
from .initializers import gaussian, uniform
from .layer import AdapterLayer, IncompatibleUpdate, Part, Start, Update, device_of


def factors_of(dimension: int, factor: int) -> tuple[int, int]:
    """Split a dimension into factors as LyCORIS does, so that other tools get the same shapes from the same settings.

    Args:
        dimension: The number to factorize.
        factor: The wanted value of m. -1: as close to the square root as possible.
    Returns:
        (m, n) with m n = dimension and m <= n. A factor that divides the dimension is used itself (as m or n);
        otherwise m is the largest divisor that is at most `factor` and at most the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = factor if factor > 0 else dimension
    m = max(i for i in range(1, int(dimension**0.5) + 1) if dimension % i == 0 and i <= limit)
    return m, dimension // m


@dataclass(frozen=True)
class LokrUpdate(Update):
    """Delta W = scale kron(W1, W2), with W1 = w1 or w1_a @ w1_b and W2 likewise.

    Args:
        w1: (out_l, in_m), or its factors (out_l, r) and (r, in_m).
        w2: (out_k, in_n), or its factors (out_k, r) and (r, in_n); out = out_l out_k, in = in_m in_n.
        alpha: The scale is alpha / r, or 1 if neither W1 nor W2 is factorized.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float | None = None

    kind: ClassVar[str] = "lokr"
    keys: ClassVar[Mapping[str, str]] = {
        **{f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}, ".alpha": "alpha",
    }  # fmt: skip

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> LokrUpdate | None:
        for name in ("w1", "w2"):
            if (name in parts) == ({f"{name}_a", f"{name}_b"} <= parts.keys()):
                return None
        if not parts.keys() <= set(cls.keys.values()) or any(t.ndim != 2 for key, t in parts.items() if key != "alpha"):
            return None
        tensors = {name: tensor for name, tensor in parts.items() if name != "alpha"}
        return cls(**tensors, alpha=float(parts["alpha"]) if "alpha" in parts else None)

    @property
    def scale(self) -> float:
        """Factor of the Kronecker product. If both sides are factorized, r is W2's rank, as in ComfyUI."""
        thin = self.w2_b if self.w2_b is not None else self.w1_b
        return 1.0 if thin is None or self.alpha is None else self.alpha / len(thin)

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _shape(self.w1, self.w1_a, self.w1_b), _shape(self.w2, self.w2_a, self.w2_b)
        return a * c, b * d

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return W1 and W2."""
        return _product(self.w1, self.w1_a, self.w1_b), _product(self.w2, self.w2_a, self.w2_b)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (
            _product(*(None if t is None else to_double(t.to(weight.device)) for t in side))
            for side in ((self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b))
        )
        return torch.kron(w1.contiguous(), w2.contiguous()) * self.scale

    def applied(self, x: Tensor) -> Tensor:
        w1, w2 = self.sides()
        return kron_linear(x, w1.to(x), w2.to(x)) * self.scale

    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        """Return the tensors by key suffix. alpha is always saved, because ComfyUI uses a scale of 1 without it."""
        named = {f".lokr_{name}": getattr(self, name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
        tensors = {end: tensor for end, tensor in named.items() if tensor is not None}
        return tensors if self.alpha is None else {**tensors, ".alpha": torch.tensor(float(self.alpha))}

    def rows(self, rows: slice) -> LokrUpdate:
        start, stop, _ = rows.indices(self.shape[0])
        height = _shape(self.w2, self.w2_a, self.w2_b)[0]
        if start % height or stop % height:
            raise IncompatibleUpdate(
                f"a Kronecker product with blocks of {height} rows can't be split at rows {start} to {stop}"
            )
        block_rows = slice(start // height, stop // height)
        if self.w1 is not None:
            return replace(self, w1=self.w1[block_rows])
        assert self.w1_a is not None
        return replace(self, w1_a=self.w1_a[block_rows])

    def fuse(self, parts: Sequence[Part], norms: Tensor) -> LokrUpdate:
        raise IncompatibleUpdate("Kronecker products of several layers can't be merged into one of the fused weight")

    def layer(self, base: nn.Linear) -> AdapterLayer:
        layer = LokrLinear(base, 1, 1.0)
        layer.load_update_(self, torch.zeros)
        return layer.requires_grad_(False)


class LokrLinear(AdapterLayer):
    """y = W x + b + s kron(W1, W2) x, computed as W1 X W2^T, where X is x as a matrix (in_m, in_n).

    W2 = w2_a w2_b if the rank is less than half of its longer edge, else one full matrix. W1 is a full matrix or, with
    `both`, follows the same rule. s = alpha / rank, or 1 if neither is factorized. W2 (or w2_a) starts at 0.

    Args:
        base: The layer.
        rank: r of the factors.
        alpha: The scale is alpha / rank.
        factor: See factors_of; -1: as square as possible.
        both: W1 may be factorized as well.
    """

    inits = KIND_RULES["lokr"].inits
    formats = KIND_RULES["lokr"].formats
    network: ClassVar[Mapping[str, str]] = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}
    update_type = LokrUpdate

    def __init__(self, base: nn.Linear, rank: int, alpha: float, factor: int = -1, both: bool = False):
        super().__init__(base, rank, alpha)
        (out_l, out_k), (in_m, in_n) = factors_of(base.out_features, factor), factors_of(base.in_features, factor)
        self._add_factors_("w1", out_l, in_m, thin=both and rank < max(out_l, in_m) / 2)
        self._add_factors_("w2", out_k, in_n, thin=rank < max(out_k, in_n) / 2)

    @classmethod
    def new(cls, base: nn.Linear, rank: int, alpha: float, config: AdapterConfig) -> LokrLinear:
        return cls(base, rank, alpha, config.lokr_factor, config.lokr_decompose_both)

    def _add_factors_(self, name: str, height: int, width: int, thin: bool) -> None:
        device = device_of(self.base)
        edges = {f"{name}_a": (height, self.rank), f"{name}_b": (self.rank, width)} if thin else {name: (height, width)}
        for part in (name, f"{name}_a", f"{name}_b"):
            tensor = nn.Parameter(torch.zeros(edges[part], device=device)) if part in edges else None
            self.register_parameter(part, tensor)

    w1: nn.Parameter | None
    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w2: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.w1_b is not None or self.w2_b is not None else 1.0

    @property
    def file_alpha(self) -> float:
        return self.alpha

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        w1, w2 = _product(self.w1, self.w1_a, self.w1_b), _product(self.w2, self.w2_a, self.w2_b)
        w1 = w1 * (self.scale * self.strength)
        return y + kron_linear(self.apply_dropout(x), w1.to(x.dtype), w2.to(x.dtype))

    @torch.no_grad()
    def start_(self, start: Start) -> None:
        draw = gaussian if start.init == "gaussian" else uniform
        for name, parameter in self.trainable():
            if name in ("w2", "w2_a"):
                parameter.zero_()
            else:
                parameter.copy_(draw(parameter.shape, start.generator))

    @torch.no_grad()
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        if not isinstance(update, LokrUpdate):
            raise IncompatibleUpdate("the file is not a LoKr; set kind to the file's kind")
        if fill is not torch.zeros:
            expected = {name: tuple(parameter.shape) for name, parameter in self.trainable()}
            shapes = {name: tuple(t.shape) for name in expected if (t := getattr(update, name)) is not None}
            if expected != shapes or update.scale != self.scale:
                raise IncompatibleUpdate(
                    f"the file's factors are {_describe_parts(update)} at scale {update.scale:g} and the run's "
                    f"{expected} at scale {self.scale:g}; "
                    "set rank, alpha, lokr_factor and lokr_decompose_both to the file's"
                )
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"):
            tensor = getattr(update, name)
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.float().to(device_of(self.base), copy=True))
            )
        thin = update.w2_b if update.w2_b is not None else update.w1_b
        if thin is not None:
            self.rank = len(thin)
            self.alpha = update.scale * self.rank

    def update(self) -> LokrUpdate:
        tensors = {name: parameter.detach().cpu().float() for name, parameter in self.trainable()}
        return LokrUpdate(**tensors, alpha=self.scale * self.rank)


def kron_linear(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return kron(w1, w2) x without building the Kronecker product. x: (..., in_m in_n) -> (..., out_l out_k)."""
    grid = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
    return (w1 @ F.linear(grid, w2)).flatten(-2)


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    assert a is not None and b is not None
    return a.shape[0], b.shape[1]


def _product(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole
    assert a is not None and b is not None
    return a @ b


def _describe_parts(update: LokrUpdate) -> dict[str, tuple[int, ...]]:
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    return {name: tuple(t.shape) for name in names if (t := getattr(update, name)) is not None}
