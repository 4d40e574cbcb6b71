"""The LoRA's weights in the model's precision, cast once a step instead of at every call.

Masters are fp32, and products run in bf16 or fp16. Cast where they are used, A and B take nine small kernels in each
layer and step: 3,762 of the 17,276 that a step of Chroma launches, while the GPU waits for the host
(docs/decisions/0035). Here a few kernels cast them all at the beginning of a step, and a few add the gradients to the
masters' after each backward pass. Every element is rounded as before and added in the same order, so the bytes of a run
stay the same.

Layers that read the same input share their copies, and are computed together (joined_lora.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...adapters.layer import AdapterLayer
from .joined_lora import JoinedLora, can_join


class WorkingCopies:
    """Copies of trainable factors, which are leaves of their own, and the way of their gradients back to the masters.

    Args:
        layers: Adapter layers by name. Those with `working_factors` take part.
        groups: Layers that read the same input, see models/projections.py.
        joins_bases: See JoinedLora.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLayer],
        groups: Sequence[Sequence[nn.Module]] = (),
        joins_bases: bool = False,
    ):
        self._joined = [JoinedLora(group, joins_bases) for group in groups if can_join(group)]  # pyright: ignore
        together = {id(layer) for joined in self._joined for layer in joined.layers}
        self._single = [layer for layer in layers.values() if layer.working_dtype and id(layer) not in together]
        own = _factors_of(self._single)
        pairs = [*own, *_factors_of(layer for joined in self._joined for layer in joined.layers)]
        self._masters = [master for master, _, _ in pairs]
        self._scales = [scale for _, scale, _ in pairs]
        # Parameters, although they are copies: compiled code takes the shapes of parameters as constants.
        self._leaves = [nn.Parameter(torch.empty_like(master, dtype=dtype)) for master, _, dtype in own]
        self._copies = [leaf.detach() for leaf in self._leaves]
        self._copies += [factor for joined in self._joined for factor in joined.factors()]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it is open the layers compute with the copies, made from the masters as they are now."""
        self._refresh_()
        for i, layer in enumerate(self._single):
            layer.working = self._leaves[2 * i], self._leaves[2 * i + 1]
        for joined in self._joined:
            joined.layers[0].together = joined
        try:
            yield
        finally:
            for layer in self._single:
                layer.working = None
            for joined in self._joined:
                joined.layers[0].together = None
            self.clear_gradients()

    @torch.no_grad()
    def _refresh_(self) -> None:
        """Masters times their scales, rounded once."""
        if self._masters:
            torch._foreach_copy_(self._copies, _scale(self._masters, self._scales))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def collect_(self) -> None:
        """Add the gradients of the copies to those of the masters. Call it after each backward pass."""
        gradients = [leaf.grad for leaf in self._leaves]
        gradients += [gradient for joined in self._joined for gradient in joined.gradients()]
        ready = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        if not ready:
            return
        used = [i for i, _ in ready]
        wide = [torch.empty_like(self._masters[i]) for i in used]
        torch._foreach_copy_(wide, [gradient for _, gradient in ready])  # pyright: ignore[reportPrivateImportUsage]
        wide = _scale(wide, [self._scales[i] for i in used])
        sums = [(self._masters[i].grad, gradient) for i, gradient in zip(used, wide, strict=True)]
        known = [(total, gradient) for total, gradient in sums if total is not None]
        if known:
            totals, more = [total for total, _ in known], [gradient for _, gradient in known]
            torch._foreach_add_(totals, more)  # pyright: ignore[reportPrivateImportUsage]
        for i, gradient in zip(used, wide, strict=True):
            if self._masters[i].grad is None:
                self._masters[i].grad = gradient
        self.clear_gradients()

    def release_bases_(self) -> None:
        """Let go of the joined bases' weights, after the model was moved elsewhere."""
        for joined in self._joined:
            if joined.base:
                joined.base.release_()

    def join_bases_(self) -> None:
        """Join the bases' weights where the model is now, after `release_bases_`."""
        for joined in self._joined:
            if joined.base:
                joined.base.join_()

    def clear_gradients(self) -> None:
        """Drop the gradients of the copies, as after a backward pass that was interrupted."""
        for leaf in self._leaves:
            leaf.grad = None
        for joined in self._joined:
            joined.clear_gradients()


def _factors_of(layers: Iterable[AdapterLayer]) -> list[tuple[Tensor, float, torch.dtype]]:
    """Return masters, what each is multiplied by, and the precision of its copy."""
    parts = [factors for layer in layers if (factors := layer.working_factors())]
    return [(master, scale, dtype) for dtype, pairs in parts for master, scale in pairs]


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
