"""Scale the loss of a model that computes in fp16, so that its gradients are numbers that fp16 has.

The loss is a mean over all values of an image, so the gradient of each value is about 1 / their number: 4e-6 at
1024 px, less with more images a step, and less again in the layers before. Below 6e-5 fp16 loses bits, and below 6e-8 it
has only 0. Multiplied by a power of 2, gradients keep every bit; the trained weights' are divided by it again, in fp32.

Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2. Where a step overflows, it is computed again with a lower
scale, and not left out: a run has the same batches in every precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

START = 2.0**16  # as torch.amp.GradScaler
FACTOR = 4.0  # between two scales
PATIENCE = 500  # steps after which a lowered scale rises


@dataclass
class LossScale:
    """The scale of the next step. It depends on the steps before, so it is part of a checkpoint.

    Attributes:
        value: Factor of the loss, from 1 to START.
        num_finite: Steps since the scale was changed.
    """

    value: float = START
    num_finite: int = 0

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.value)  # pyright: ignore[reportPrivateImportUsage]

    def lower_(self) -> bool:
        """Lower the scale after a step whose gradients were not finite. Return False where it can't be lower."""
        if self.value / FACTOR < 1:
            return False
        self.value, self.num_finite = self.value / FACTOR, 0
        return True

    def count_(self) -> None:
        """Count a step whose gradients were finite."""
        self.num_finite += 1
        if self.num_finite >= PATIENCE and self.value < START:
            self.value, self.num_finite = self.value * FACTOR, 0

    def as_json(self) -> list[float]:
        return [self.value, self.num_finite]

    def load_(self, saved: list[float]) -> None:
        """Load what as_json returned."""
        self.value, self.num_finite = float(saved[0]), int(saved[1])
