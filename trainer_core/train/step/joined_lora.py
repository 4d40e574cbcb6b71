"""LoRA layers that read the same input, computed with one product each for the bases, for A and for B.

One by one, queries, keys and values take 9 products forward and 18 kernels backward, in every block and again where it
is recomputed. Joined they take 3 and 9 (docs/decisions/0035). Each output element is the same dot product as before;
the gradient with respect to the input is summed in another order, so last bits change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.layer import AdapterLayer


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Return whether these layers are LoRAs of equal rank and precision whose input is not changed by dropout."""
    if not all(isinstance(layer, AdapterLayer) and layer.is_joinable for layer in layers):
        return False
    kinds = {(type(layer), layer.rank, layer.in_features, layer.working_dtype) for layer in layers}  # pyright: ignore
    return len(layers) > 1 and len(kinds) == 1


class JoinedLora:
    """Computes the outputs of several LoRA layers together, with factors in the precision of their products.

    Args:
        layers: n layers of rank r with the same input, see can_join.
        joins_bases: move the bases' weights into one tensor, of which they become views. Only where weights stay on
            their device, and have memory of their own (weights that are mapped from a file would be copied).
    """

    def __init__(self, layers: Sequence[AdapterLayer], joins_bases: bool):
        dtype = layers[0].working_dtype
        assert dtype is not None
        rank, device = layers[0].rank, next(layers[0].trainable())[1].device
        width = layers[0].out_features
        # Those of the first layer's width share a batched product.
        self.num_stacked = next((i for i, layer in enumerate(layers) if layer.out_features != width), len(layers))
        self.layers = list(layers)
        # Parameters, although they are copies: compiled code takes the shapes of parameters as constants.
        self.down = _leaf((len(layers) * rank, layers[0].in_features), dtype, device)
        self.ups = _leaf((self.num_stacked, width, rank), dtype, device)
        self.other_ups = [_leaf((layer.out_features, rank), dtype, device) for layer in layers[self.num_stacked :]]
        self.base = JoinedBase([layer.base for layer in layers]) if joins_bases and _are_plain(layers) else None

    def factors(self) -> list[Tensor]:
        """Return a view of A, (r, in), and of B, (out, r), for each layer: A, B, A, B, ..."""
        return self._by_layer(self.down.detach(), self.ups.detach(), [up.detach() for up in self.other_ups])

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of `factors`; None for all of them before a backward pass."""
        gradients = self.down.grad, self.ups.grad, [up.grad for up in self.other_ups]
        if gradients[0] is None or gradients[1] is None or any(gradient is None for gradient in gradients[2]):
            return [None] * (2 * len(self.layers))
        return list(self._by_layer(*gradients))  # pyright: ignore[reportArgumentType]

    def clear_gradients(self) -> None:
        for leaf in (self.down, self.ups, *self.other_ups):
            leaf.grad = None

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """Return each layer's output, (..., out) each, or None where a layer's strength is not 1."""
        if any(layer.strength != 1.0 for layer in self.layers):
            return None
        n, rank = self.num_stacked, self.layers[0].rank
        inner = F.linear(x, self.down).flatten(0, -2)
        first, *others = inner.split([n * rank, *[rank] * len(self.other_ups)], dim=1)
        outputs: list[Tensor] = self.base(x) if self.base else []
        if not self.base:
            # No comprehension: where nf4 breaks the graph, torch 2.11 on Python 3.12 fails within one.
            for layer in self.layers:
                outputs.append(layer.base(x))
        bases = torch.stack([output.flatten(0, -2) for output in outputs[:n]])
        first = first.unflatten(1, (n, rank)).transpose(0, 1)
        sums = list(bases.baddbmm_(first, self.ups.transpose(1, 2)).unbind(0))
        for output, other, up in zip(outputs[n:], others, self.other_ups, strict=True):
            sums.append(torch.addmm(output.flatten(0, -2), other, up.t()))
        return [total.view(*x.shape[:-1], total.shape[-1]) for total in sums]

    def _by_layer(self, down: Tensor, ups: Tensor, other_ups: Sequence[Tensor]) -> list[Tensor]:
        downs = down.chunk(len(self.layers))
        return [part for pair in zip(downs, [*ups.unbind(0), *other_ups], strict=True) for part in pair]


class JoinedBase:
    """Several linear layers' product with the same input, as one. Their weights become views of one tensor.

    Args:
        layers: Frozen layers, all with a bias or all without.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Linear]):
        self.widths = [layer.out_features for layer in layers]
        self._parts = [[layer.weight for layer in layers]]
        self.weight = _join_(self._parts[0])
        self.bias = None
        if layers[0].bias is not None:
            self._parts.append([layer.bias for layer in layers])
            self.bias = _join_(self._parts[1])

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return each layer's output, (..., out) each; views of one tensor."""
        return list(F.linear(x, self.weight, self.bias).split(self.widths, dim=-1))

    def release_(self) -> None:
        """Let go of the weights, after the layers were moved elsewhere."""
        for joined in self._joined():
            joined.data = joined.data.new_empty(0)

    def join_(self) -> None:
        """Join the weights where the layers are now, after `release_`."""
        for joined, parts in zip(self._joined(), self._parts, strict=True):
            joined.data = _join_(parts).data

    def _joined(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def _join_(parts: Sequence[Tensor]) -> nn.Parameter:
    """Move these parameters into one, and make them views of it."""
    joined = nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
    for part, rows in zip(parts, joined.data.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return joined


def _are_plain(layers: Sequence[AdapterLayer]) -> bool:
    """Return whether the bases are ordinary linear layers, which nothing wraps."""
    bases = [layer.base for layer in layers]
    are_linear = all(type(base) is nn.Linear and "forward" not in base.__dict__ for base in bases)
    return are_linear and len({(base.bias is None, base.weight.dtype, base.weight.device) for base in bases}) == 1


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
