"""OFT: a trained rotation of the layer's output, in blocks along the diagonal. It changes no lengths.

W' = R W with R = (I + Q)^-1 (I - Q) in each block, where Q is skew-symmetric (the Cayley transform).

peft's module has the parameters and computes R. peft's own layers rotate the input; LyCORIS and ComfyUI rotate the
output, and so does this layer, so that ComfyUI loads the file.

Source: Qiu et al. 2023, arXiv:2306.07280.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.adapter import KIND_RULES
from .dense_weight import to_double
from .layer import AdapterLayer, IncompatibleUpdate, Part, Start, Update, device_of


@dataclass(frozen=True)
class OftUpdate(Update):
    """Q = blocks - blocks^T, (blocks, size, size). `shape` is that of R, since a file does not say the layer's width."""

    blocks: Tensor

    kind: ClassVar[str] = "oft"
    keys: ClassVar[Mapping[str, str]] = {".oft_blocks": "blocks", ".alpha": "alpha"}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> OftUpdate | None:
        blocks = parts.get("blocks")
        if blocks is None or blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            return None
        limit, norm = float(parts.get("alpha", 0)), (blocks - blocks.mT).norm().item()  # LyCORIS' constraint
        return cls(blocks * (limit / norm) if 0 < limit < norm else blocks)

    @property
    def shape(self) -> tuple[int, int]:
        height = len(self.blocks) * self.blocks.shape[1]
        return height, height

    def fits(self, shape: tuple[int, int]) -> bool:
        return shape[0] == self.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        q = to_double((self.blocks - self.blocks.mT).to(weight.device))
        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
        change = torch.linalg.solve(eye + q, eye - q) - eye
        return (change @ to_double(weight).to(q.device).unflatten(0, q.shape[:2])).flatten(0, 1)

    def applied(self, x: Tensor) -> Tensor:
        return self.delta(x[:, None]).flatten().to(x.dtype)

    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        return {".oft_blocks": self.blocks}

    def rows(self, rows: slice) -> OftUpdate:
        raise IncompatibleUpdate("a rotation of a fused layer's rows can't be split")

    def fuse(self, parts: Sequence[Part], norms: Tensor) -> OftUpdate:
        raise IncompatibleUpdate("rotations of several layers can't be merged into one of the fused weight")

    def layer(self, base: nn.Linear) -> AdapterLayer:
        layer = OftLinear(base, self.blocks.shape[1], 1.0)
        layer.load_update_(self, torch.zeros)
        return layer.requires_grad_(False)


class OftLinear(AdapterLayer):
    """y = R W x + b. Products run in the input's precision, with R - I, so that small rotations are not rounded away.

    The rank is the size of a block: the largest divisor of the layer's height up to the rank that was set. ComfyUI
    multiplies by the strength twice, W + t^2 (W' - W), and so does this layer.
    """

    inits = KIND_RULES["oft"].inits
    formats = KIND_RULES["oft"].formats
    network: ClassVar[Mapping[str, str]] = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "diag-oft"}',
    }
    update_type = OftUpdate

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, block_size(base.out_features, rank), alpha)
        from peft.tuners.oft.layer import OFTRotationModule

        count = base.out_features // self.rank
        rotation: Any = OFTRotationModule(
            count, self.rank * (self.rank - 1) // 2, self.rank, base.out_features, use_cayley_neumann=False
        )
        nn.init.zeros_(rotation.weight)
        self.rotation = rotation.to(device_of(base))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "oft_R", self.rotation.weight

    def change(self) -> Tensor:
        """Return R - I of each block, (blocks, size, size), fp32. peft's module multiplies from the right."""
        weight = self.rotation.weight
        eye = torch.eye(self.rank, dtype=weight.dtype, device=weight.device)
        rotated = self.rotation(eye.repeat(1, len(weight))).unflatten(-1, (len(weight), self.rank))
        return rotated.permute(1, 2, 0) - eye

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        product = self.apply_dropout(y if self.base.bias is None else y - self.base.bias)
        change = (self.change() * self.strength**2).to(y.dtype)
        return y + torch.einsum("...ki,koi->...ko", product.unflatten(-1, change.shape[:2]), change).flatten(-2)

    @property
    def summed_base(self) -> None:
        """None: the rotation's gradient reads the base's output."""

    def start_(self, start: Start) -> None:
        """R = I, which __init__ sets."""

    @torch.no_grad()
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        if not isinstance(update, OftUpdate):
            raise IncompatibleUpdate("the file is not an OFT; set kind to the file's kind")
        if (size := update.blocks.shape[1]) != self.rank:
            raise IncompatibleUpdate(
                f"the file's blocks have {size} rows and the run's {self.rank}; set rank to {size}"
            )
        q = (update.blocks - update.blocks.mT).to(self.rotation.weight)
        self.rotation.weight.copy_(-q[:, self.rotation.rows, self.rotation.cols])

    def update(self) -> OftUpdate:
        weight = self.rotation.weight.detach().cpu().float()
        blocks = weight.new_zeros(len(weight), self.rank, self.rank)
        blocks[:, self.rotation.rows.cpu(), self.rotation.cols.cpu()] = -weight
        return OftUpdate(blocks)


def block_size(height: int, rank: int) -> int:
    """Return the largest divisor of the height up to the rank; at least 2, as a block of 1 has no rotation."""
    smaller = (size for size in range(rank, 1, -1) if height % size == 0)
    return next(smaller, None) or next(size for size in range(2, height + 1) if height % size == 0)
