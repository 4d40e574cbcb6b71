"""Linear algebra of low-rank updates. Everything is computed from the factors, never from the full matrices.

Delta = U D with U (out, r) and D (r, in). With U = Q_u R_u and D^T = Q_d R_d, the singular values of Delta are those of
R_u R_d^T, (r, r), and <U D, U' D'> = sum((U^T U') o (D D'^T)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from ..adapters.layer import IncompatibleUpdate, Update
from ..adapters.loha import LohaUpdate
from ..adapters.lokr import LokrUpdate
from ..adapters.lora import LoraPair

ENERGY = 0.95
# Largest rank of a product of factors. A LoHa of rank 32 has 1024; above that the full matrix is smaller.
MAX_RANK = 1024


@dataclass(frozen=True)
class Decomposition:
    """Delta = left diag(values) right.

    Attributes:
        left: Orthonormal columns, (out, k).
        values: Singular values, (k,), in descending order.
        right: Orthonormal rows, (k, in).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def cut(self, rank: int) -> LoraPair:
        """Return the best approximation of this rank, with the scale shared by both factors."""
        root = self.values[:rank].sqrt()
        return LoraPair((root[:, None] * self.right[:rank]).float(), (self.left[:, :rank] * root).float())


def decompose(up: Tensor, down: Tensor) -> Decomposition:
    """Return the singular value decomposition of up @ down."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(_real(up)), torch.linalg.qr(_real(down).t())
    left, values, right = torch.linalg.svd(r_up.double() @ r_down.double().t(), full_matrices=False)
    return Decomposition(q_up.double() @ left, values, right @ q_down.double().t())


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Return the singular values of up @ down, (r,), fp64."""
    r_up, r_down = (torch.linalg.qr(factor, mode="r")[1].double() for factor in (_real(up), _real(down).t()))
    return torch.linalg.svdvals(r_up @ r_down.t())


def _real(factor: Tensor) -> Tensor:
    """Convert for a QR decomposition: fp64 stays, everything else is fp32. QR is far slower in fp64, and files are fp32."""
    return factor if factor.dtype == torch.float64 else factor.float()


def rank_of_energy(values: Tensor, energy: float = ENERGY) -> int:
    """Return the number of largest singular values that hold this share of the squared norm, at least 1."""
    return max(1, min(len(values), int((shares_of_energy(values) < energy - 1e-12).sum()) + 1))


def shares_of_energy(values: Tensor) -> Tensor:
    """Return the share of the squared norm that the largest singular value holds, the largest two, and so on.

    Of an update that is zero, each rank holds all of it.
    """
    squares = values.square()
    total = float(squares.sum())
    return squares.cumsum(0) / total if total else torch.ones_like(squares)


def inner(first: LoraPair, second: LoraPair) -> float:
    """Return the sum of the products of all elements of two updates of one layer."""
    left = first.up.double().t() @ second.up.double()
    right = first.down.double() @ second.down.double().t()
    return float((left * right).sum())


def norm(pair: LoraPair) -> float:
    """Return the Frobenius norm of an update."""
    return max(0.0, inner(pair, pair)) ** 0.5


def overlap(first: Decomposition, second: Decomposition, energy: float = ENERGY) -> float:
    """Return how far the main directions of two updates of one layer agree, from 0 (none) to 1 (one contains the other).

    The mean of outputs and inputs of |P_1 P_2|^2 / min(k_1, k_2), with the projections on the directions that hold this
    share of each update's energy.
    """
    one, two = (rank_of_energy(part.values, energy) for part in (first, second))
    outputs = (first.left[:, :one].t() @ second.left[:, :two]).square().sum()
    inputs = (first.right[:one] @ second.right[:two].t()).square().sum()
    return float((outputs + inputs) / (2 * min(one, two)))


@singledispatch
def as_product(update: Update) -> LoraPair:
    """Return an update as one product of two factors, exactly.

    Raises:
        IncompatibleUpdate: This kind is no product of two small factors.
    """
    raise IncompatibleUpdate("this kind depends on the base model's weights, so it is no product of two factors")


@as_product.register
def _(update: LoraPair) -> LoraPair:
    if update.is_dora:
        raise IncompatibleUpdate(
            "a DoRA rescales the rows of the base model's weights, so it is no product of two factors"
        )
    return update


@as_product.register
def _(update: LohaUpdate) -> LoraPair:
    """(A1 B1) o (A2 B2) = sum over i, j of (a1_i o a2_j) (b1_i o b2_j)^T, so the rank is r^2."""
    _check_rank(update.rank**2)
    up = (update.w1_a.double()[:, :, None] * update.w2_a.double()[:, None, :]).flatten(1)
    down = (update.w1_b.double()[:, None, :] * update.w2_b.double()[None, :, :]).flatten(0, 1)
    return LoraPair(down, up * update.scale)


@as_product.register
def _(update: LokrUpdate) -> LoraPair:
    """kron(U1 D1, U2 D2) = kron(U1, U2) kron(D1, D2): the rank is the product of both ranks."""
    sides = [_thin(side.double()) for side in update.sides()]
    _check_rank(sides[0].rank * sides[1].rank)
    up, down = (_kron(getattr(sides[0], name), getattr(sides[1], name)) for name in ("up", "down"))
    return LoraPair(down, up * update.scale)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """Return the Kronecker product. torch.kron fails for some strides of matrices with one row or column."""
    grid = one[:, None, :, None] * two[None, :, None, :]
    return grid.reshape(len(one) * len(two), one.shape[1] * two.shape[1])


def _thin(matrix: Tensor) -> LoraPair:
    """Return a matrix as a product of factors whose size is its numerical rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int((values > values[:1] * 1e-7).sum()))
    return LoraPair(right[:rank], left[:, :rank] * values[:rank])


def _check_rank(rank: int) -> None:
    if rank > MAX_RANK:
        raise IncompatibleUpdate(f"as a product of two factors its rank is {rank}; the limit is {MAX_RANK}")


def spectrum(update: Update) -> Tensor | None:
    """Return the singular values of an update, fp64; None if they depend on the base model.

    Of a DoRA, those of the product of its factors, without the scales of the rows. Of a Kronecker product they are the
    products of those of both sides.
    """
    if isinstance(update, LokrUpdate):
        one, two = (torch.linalg.svdvals(side.double()) for side in update.sides())
        values = torch.outer(one, two).flatten().sort(descending=True).values * abs(update.scale)
        return values[: min(update.shape)]
    if isinstance(update, LoraPair):
        return singular_values(update.up, update.down)
    try:
        pair = as_product(update)
    except IncompatibleUpdate:
        return None
    return singular_values(pair.up, pair.down)
