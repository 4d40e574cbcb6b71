"""LoKr: the update is a Kronecker product, of high rank from few numbers.

Yeh et al. 2023, arXiv:2309.14859 (LyCORIS):  W' = W + s kron(W1, W2), where W1 or W2 may be a product of two thin matrices.
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
    """(m, n) with m n = dimension and m <= n: m the divisor nearest below `factor`, or below the root where factor is -1 or more.

    As LyCORIS', so that other tools make the same shapes of the same settings: a factor that divides the dimension is m itself.
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
        alpha: the scale is alpha / r; without any factors it is 1.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float | None = None

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
        """ComfyUI counts the rank of W2's factors where both have them."""
        thin = self.w2_b if self.w2_b is not None else self.w1_b
        return 1.0 if thin is None or self.alpha is None else self.alpha / len(thin)

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _shape(self.w1, self.w1_a, self.w1_b), _shape(self.w2, self.w2_a, self.w2_b)
        return a * c, b * d

    def sides(self) -> tuple[Tensor, Tensor]:
        """W1 and W2."""
        return _product(self.w1, self.w1_a, self.w1_b), _product(self.w2, self.w2_a, self.w2_b)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (
            _product(*(None if t is None else to_double(t.to(weight.device)) for t in side))
            for side in ((self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b))
        )
        return torch.kron(w1, w2) * self.scale

    def applied(self, x: Tensor) -> Tensor:
        w1, w2 = self.sides()
        return kron_linear(x, w1.to(x), w2.to(x)) * self.scale

    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        """Always with an alpha: ComfyUI takes the scale for 1 without it."""
        named = {f".lokr_{name}": getattr(self, name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
        found = {end: tensor for end, tensor in named.items() if tensor is not None}
        return found if self.alpha is None else {**found, ".alpha": torch.tensor(float(self.alpha))}

    def rows(self, rows: slice) -> LokrUpdate:
        start, stop, _ = rows.indices(self.shape[0])
        height = _shape(self.w2, self.w2_a, self.w2_b)[0]
        if start % height or stop % height:
            raise IncompatibleUpdate(
                f"a Kronecker product of blocks of {height} rows can't be cut to rows {start} to {stop}"
            )
        some = slice(start // height, stop // height)
        if self.w1 is not None:
            return replace(self, w1=self.w1[some])
        assert self.w1_a is not None
        return replace(self, w1_a=self.w1_a[some])

    def fuse(self, parts: Sequence[Part], norms: Tensor) -> LokrUpdate:
        raise IncompatibleUpdate("a Kronecker product of fused rows is none of its parts")

    def layer(self, base: nn.Linear) -> AdapterLayer:
        layer = LokrLinear(base, 1, 1.0)
        layer.load_update_(self, torch.zeros)
        return layer.requires_grad_(False)


class LokrLinear(AdapterLayer):
    """y = W x + b + s kron(W1, W2) x, computed as W1 X W2^T over x as a matrix X (in_m, in_n).

    W2 = w2_a w2_b where the rank is less than half of its longer edge, else a whole matrix; W1 is whole, or with `both` by the same
    rule. s = alpha / rank, or 1 where neither has factors. W2 (or its factor a) starts at 0.

    Args:
        factor: see factors_of; -1: as square as it goes.
        both: W1 may have factors as well.
    """

    inits = KIND_RULES["lokr"].inits
    formats = KIND_RULES["lokr"].formats
    network: ClassVar[Mapping[str, str]] = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}
    update_type = LokrUpdate

    def __init__(self, base: nn.Linear, rank: int, alpha: float, factor: int = -1, both: bool = False):
        super().__init__(base, rank, alpha)
        (out_l, out_k), (in_m, in_n) = factors_of(base.out_features, factor), factors_of(base.in_features, factor)
        self._make_("w1", out_l, in_m, thin=both and rank < max(out_l, in_m) / 2)
        self._make_("w2", out_k, in_n, thin=rank < max(out_k, in_n) / 2)

    @classmethod
    def new(cls, base: nn.Linear, rank: int, alpha: float, config: AdapterConfig) -> LokrLinear:
        return cls(base, rank, alpha, config.lokr_factor, config.lokr_decompose_both)

    def _make_(self, name: str, height: int, width: int, thin: bool) -> None:
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
            raise IncompatibleUpdate("the file is no LoKr; set kind to what it is")
        if fill is not torch.zeros:
            wanted = {name: tuple(parameter.shape) for name, parameter in self.trainable()}
            found = {name: tuple(t.shape) for name in wanted if (t := getattr(update, name)) is not None}
            if wanted != found or update.scale != self.scale:
                raise IncompatibleUpdate(
                    f"the file's factors are {_describe_parts(update)} at scale {update.scale:g} and the run's {wanted} at scale "
                    f"{self.scale:g}; set rank, alpha, lokr_factor and lokr_decompose_both to the file's"
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
    """kron(w1, w2) x without forming it. x: (..., in_m in_n) -> (..., out_l out_k)."""
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
