"""Initial values of a low-rank update, random or computed from the weight.

Results are deterministic: the signs of singular vectors are fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dense_weight import to_double

OVERSAMPLING = 8


def uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), as in peft: uniform in +-1/sqrt(in)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])


def gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal with standard deviation 1 / rank, for a shape (rank, in)."""
    return torch.randn(shape, generator=generator) / shape[0]


def orthogonal(rank: int, num_out: int, num_in: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), both nonzero, with B A = 0: they use two halves of one orthonormal basis.

    A = Q_even^T X / 10,  B = Y Q_odd / 10,  Q from the QR of a normal (r, r) matrix, X and Y normal. With rank 1 B is
    0.
    """
    q = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    even, odd = q[0::2], q[1::2]
    a = even.t() @ torch.randn(len(even), num_in, generator=generator, dtype=torch.float64) / 10
    b = torch.randn(num_out, len(odd), generator=generator, dtype=torch.float64) @ odd / 10
    return a.float(), b.float()


def principal(weight: Tensor, rank: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and V^T (r, in) of the r largest singular values.

    The largest component of each row of V^T is positive.

    Args:
        weight: The weight, (out, in).
        rank: r.
        iterations: Iterations of the randomized range finder. 0: an exact SVD, which takes minutes for large layers.
        generator: Random numbers of the range finder.
    Source: Halko et al. 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    weight = weight.float()
    if iterations == 0 or rank + OVERSAMPLING >= min(weight.shape):
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        probe = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator).to(weight.device)
        q = torch.linalg.qr(weight @ probe).Q
        for _ in range(iterations):
            q = torch.linalg.qr(weight.t() @ q).Q
            q = torch.linalg.qr(weight @ q).Q
        u, s, vt = torch.linalg.svd(q.t() @ weight, full_matrices=False)
        u = q @ u
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    return u * sign.t(), s, vt * sign


def pissa(
    weight: Tensor, rank: int, scale: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A = sqrt(S / s) V^T and B = U sqrt(S / s): s B A is the best rank-r approximation of the weight.

    Source: Meng et al. 2024, arXiv:2404.02948.
    """
    u, s, vt = principal(weight, rank, iterations, generator)
    root = (s / scale).sqrt()
    return root[:, None] * vt, u * root


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first r rows of R and the first r columns of Q, where W = Q R and R's diagonal is not negative.

    Source: Buyukakyuz 2024, arXiv:2406.01775.
    """
    q, r = torch.linalg.qr(weight.float())
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0)[:rank]
    return r[:rank] * sign[:, None], q[:, :rank] * sign


class Directions:
    """The main right singular vectors of all inputs of a layer, computed batch by batch without storing the inputs.

    After each batch the sketch holds S V^T of all inputs so far, truncated to `width` rows.

    Args:
        width: Number of rows in the sketch. Use more than the number of rows needed at the end, because truncation
            loses information.
    Source: EVA, Paischer et al. 2024, arXiv:2410.07170, with the incremental SVD of Ross et al. 2008 without centering.
    """

    def __init__(self, width: int):
        self.width = width
        self.sketch: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Add a batch of inputs, (tokens, in)."""
        rows = x.detach().float() if self.sketch is None else torch.cat([self.sketch, x.detach().float()])
        # Use the small Gram matrix, in fp64: there are a few hundred rows and thousands of columns.
        exact = to_double(rows)
        values, vectors = torch.linalg.eigh(exact @ exact.t())
        rank = min(self.width, len(values))
        self.sketch = (vectors[:, -rank:].flip(1).t() @ exact).float().to(x.device)

    def rows(self, count: int) -> Tensor:
        """Return unit vectors, (up to count, in), strongest first; fewer if the inputs span fewer dimensions."""
        assert self.sketch is not None, "no inputs were added"
        sketch = to_double(self.sketch)
        length = sketch.norm(dim=1)
        sketch = sketch[: int((length > 1e-6 * length.max()).sum())][:count]
        unit = sketch / sketch.norm(dim=1, keepdim=True)
        return (unit * unit.gather(1, unit.abs().argmax(1, keepdim=True)).sign()).float()
