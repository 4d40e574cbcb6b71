"""The LoRA's weights in the model's precision, cast once a step instead of at every call.

Masters are fp32, and products run in bf16 or fp16. Cast where they are used, A and B take nine small kernels in each layer and step: 3,762
of the 17,276 that a step of Chroma launches, while the GPU waits for the host (docs/decisions/0035). Here a few kernels cast them all at
the beginning of a step, and a few add the gradients to the masters' after each backward pass. Every element is rounded as before and
added in the same order, so the bytes of a run stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...adapters.layer import AdapterLayer


class WorkingCopies:
    """Copies of trainable factors, which are leaves of their own, and the way of their gradients back to the masters.

    Args:
        layers: adapter layers by name. Those whose `working_factors` gives something take part.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer]):
        parts = [(layer, layer.working_factors()) for layer in layers.values()]
        self._layers = [layer for layer, factors in parts if factors]
        pairs = [(master, scale, factors[0]) for _, factors in parts if factors for master, scale in factors[1]]
        self._masters = [master for master, _, _ in pairs]
        self._scales = [scale for _, scale, _ in pairs]
        self._copies = [torch.empty_like(master, dtype=dtype).requires_grad_() for master, _, dtype in pairs]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it is open the layers compute with the copies, made from the masters as they are now."""
        self._refresh_()
        for i, layer in enumerate(self._layers):
            layer.working = self._copies[2 * i], self._copies[2 * i + 1]
        try:
            yield
        finally:
            for layer in self._layers:
                layer.working = None
            for copy in self._copies:
                copy.grad = None

    @torch.no_grad()
    def _refresh_(self) -> None:
        """Masters times their scales, rounded once."""
        if self._masters:
            torch._foreach_copy_(self._copies, _scale(self._masters, self._scales))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def collect_(self) -> None:
        """Add the gradients of the copies to those of the masters. Call it after each backward pass."""
        found = [(i, copy.grad) for i, copy in enumerate(self._copies) if copy.grad is not None]
        if not found:
            return
        used = [i for i, _ in found]
        gradients = [torch.empty_like(self._masters[i]) for i in used]
        torch._foreach_copy_(gradients, [gradient for _, gradient in found])  # pyright: ignore[reportPrivateImportUsage]
        gradients = _scale(gradients, [self._scales[i] for i in used])
        sums = [(self._masters[i].grad, gradient) for i, gradient in zip(used, gradients, strict=True)]
        known = [(total, gradient) for total, gradient in sums if total is not None]
        if known:
            totals, more = [total for total, _ in known], [gradient for _, gradient in known]
            torch._foreach_add_(totals, more)  # pyright: ignore[reportPrivateImportUsage]
        for i, gradient in zip(used, gradients, strict=True):
            if self._masters[i].grad is None:
                self._masters[i].grad = gradient
            self._copies[i].grad = None


def _scale(tensors: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Each tensor times its scale; those with a scale of 1 are not copied."""
    places = [i for i, scale in enumerate(scales) if scale != 1.0]
    result = list(tensors)
    if places:
        parts, factors = [result[i] for i in places], [scales[i] for i in places]
        products = torch._foreach_mul(parts, factors)  # pyright: ignore[reportPrivateImportUsage]
        for i, product in zip(places, products, strict=True):
            result[i] = product
    return result
