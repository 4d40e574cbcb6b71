"""DoRA: LoRA trains the direction of each weight row, and a separate parameter trains its length.

W' = m (W + s B A) / |W + s B A|, row by row. No gradient flows through the norm (section 4.3 of the paper).

Source: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config.adapter import KIND_RULES
from .dense_weight import dense_weight, to_double
from .layer import Update, product_dtype
from .lora import LoraLinear, LoraPair, row_norms


class DoraLinear(LoraLinear):
    """y = g (W + s B A) x + b with g = m / |W + s B A|, (out,).

    The norm is computed without forming W + s B A: row by row, |W + D|^2 = |W|^2 + 2 <W, D> + |D|^2 with D = up down of
    rank r. W is only needed in a product with r vectors, so quantized weights are never dequantized for it.

    At a strength t other than 1 the weight is W + t (W' - W), as in ComfyUI.
    """

    inits = KIND_RULES["dora"].inits
    network: ClassVar[Mapping[str, str]] = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "lora", "dora_wd": "True"}',
    }

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        norms = row_norms(dense_weight(base).float()).to(self.lora_A.device)
        self.magnitude = nn.Parameter(norms.clone())
        self.square_norms: Tensor
        self.register_buffer("square_norms", to_double(norms).square().float().to(norms.device), persistent=False)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint stores. The base's norms are not stored: they are recomputed from the base."""
        return ((name, tensor) for name, tensor in super().state() if name != "square_norms")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        inputs = self.apply_dropout(x)
        product = self._product(y) if inputs is x else self.base_product(inputs)
        gain = (self.magnitude / self.norms()).to(x.dtype)
        return y + self.strength * (self.add_update(product, inputs, 1.0) * gain - product)

    def parts_of_base(self) -> frozenset[str]:
        return super().parts_of_base() | {"magnitude"}

    def rounded_(self, before: Mapping[str, Tensor]) -> None:
        """Keep the magnitudes in full precision: they are few, and 0.2 % of one is 0.2 % of a whole row of the base."""
        super().rounded_(before)
        self.magnitude.data = before["magnitude"]

    @property
    def summed_base(self) -> None:
        """None: the magnitude's gradient reads the base's output."""

    def _product(self, y: Tensor) -> Tensor:
        return y if self.base.bias is None else y - self.base.bias

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return |W + s B A| of each row, (out,), fp32."""
        down, up = self.factors()
        up = up * self.scale
        crossed = self.base_product(down.to(product_dtype(self.base))).float()  # (r, out)
        added = 2 * (crossed.t() * up).sum(1) + ((up @ (down @ down.t())) * up).sum(1)
        return (self.square_norms + added).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        """Load an update. A plain LoRA keeps its effect: the magnitudes are the row norms that it produces."""
        pair = self.fitting(update)
        self._load_factors_(pair, fill)
        weight = to_double(dense_weight(self.base).to(self.magnitude.device))
        plain = LoraPair(pair.down, pair.up)
        norms = row_norms(weight + plain.delta(weight))
        self.magnitude.copy_((norms if not pair.is_dora else pair.row_factors(weight).flatten() * norms).float())

    def update(self) -> LoraPair:
        """Return the update with both forms of the magnitude.

        ComfyUI divides by the norm of W, peft by the norm of W + s B A. Both values are saved, and both are exact.
        """
        pair = super().update()
        weight = dense_weight(self.base).cpu().double()
        magnitude = self.magnitude.detach().cpu().float()
        factors = LoraPair(pair.down, pair.up, magnitude=magnitude).row_factors(weight)
        ratio = (factors.flatten() * row_norms(weight)).float()[:, None]
        return LoraPair(pair.down, pair.up, magnitude, ratio)
