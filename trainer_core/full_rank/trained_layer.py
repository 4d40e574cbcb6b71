"""Full-rank training: the layer's own weight and bias are trained, in the model's precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..adapters.layer import AdapterLayer, Start, Update


class FullLinear(AdapterLayer):
    """A Linear whose weight and bias are trained. There is no copy of the original weight.

    `strength` has no effect: setup/full_rank_check.py refuses what needs the base model beside the trained one. Images and
    losses of the base model are measured before the first step.

    Args:
        base: The layer. Its weight and bias become parameters with memory of their own, because they may be mapped
            from a file, or be rows of a fused weight there.
    """

    inits = ("default",)

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        for part, value in [*base.named_parameters(recurse=False)]:
            setattr(base, part, nn.Parameter(value.detach().clone()))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.base.named_parameters(recurse=False)

    def parts_of_base(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.trainable())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    @property
    def summed_base(self) -> nn.Linear | None:
        """None: the gradient of the weight reads the layer's input, so a recomputed block computes the layer too."""
        return None

    def start_(self, start: Start) -> None:
        """Do nothing: the training starts from the model as it is."""

    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        raise NotImplementedError("a trained weight is no update; setup/full_rank_check.py refuses init_lora")

    def update(self) -> Update:
        raise NotImplementedError("a trained weight is no update; lora_tools/extract.py makes one")
