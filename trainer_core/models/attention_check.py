"""Which attention kernel computes right on a device, shown on what this model's blocks hand it.

A kernel that runs can be wrong: cuDNN's gave NaN in every gradient, and then illegal memory accesses, for the strides that a single
block's backward pass hands it, where it was right alone on contiguous tensors (H200, torch 2.11, bf16). So a kernel is shown to be
right before it trains: on random numbers in the model's dtype, with the run's own numbers of tokens, with the views that blocks hand it and
the join or the split behind it, outputs and gradients against the slow kernel in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import reason_of
from ..seeds import generator
from .attention_backends import attention
from .mmdit_layers import Attend, attend_heads, join

# Relative to the size of what is right. Half precision rounds by 2^-9 (bf16): kernels that are right were off by 0.004 (H200). fp32:
# products may run in TF32.
HALF_ERROR, FULL_ERROR = 0.03, 0.005
MAX_BATCH = 2  # two samples show the strides of any batch


@dataclass(frozen=True)
class AttentionShape:
    """What one attention of a model meets. text, image: tokens. head_width: 128 in Chroma and Flux, with 24 heads."""

    batch: int
    text: int
    image: int
    heads: int
    head_width: int

    def __str__(self) -> str:
        return f"{self.batch} x ({self.text} + {self.image}) tokens, {self.heads} heads of {self.head_width}"


def kernel_fault(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool = False
) -> str:
    """'' where this kernel's outputs and gradients are right, in a double and in a single block; else what is wrong.

    Args:
        name: see kernels.attention.
        masked: with a mask that leaves out some text tokens of the first sample.
    Raises:
        torch.OutOfMemoryError: there is no room to try it.
    """
    kernel = attention(name, masked=name)
    for block in (_double_block, _single_block):
        try:
            with (
                warnings.catch_warnings(record=True) as reasons,
                torch.enable_grad(),
            ):  # torch warns why a kernel refuses
                warnings.simplefilter("always")
                fault = block(kernel, shape, device, dtype, masked)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            told = [str(entry.message).splitlines()[0] for entry in reasons if "kernel" in str(entry.message)]
            return f"does not run ({'; '.join([reason_of(error), *told[-1:]])})"
        if fault:
            return fault
    return ""


@dataclass(frozen=True)
class _Inputs:
    """Random numbers of one block's attention: query, key, value and the result's gradient, (B, tokens, heads * head width) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    mask: Tensor | None
    heads: int

    @classmethod
    def draw(cls, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool) -> _Inputs:
        source = generator(0, "attention check", str(shape), device=device)
        tokens, batch = shape.text + shape.image, min(shape.batch, MAX_BATCH)
        size = batch, tokens, shape.heads * shape.head_width
        # Norms make queries and keys of size 1 a feature; values and gradients are of any size.
        query, key, value, gradient = (torch.randn(size, generator=source, device=device).to(dtype) for _ in range(4))
        mask = None
        if masked:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
            mask[0, shape.text // 2 : shape.text] = False
        return cls(query, key, value, gradient, mask, shape.heads)

    def of_heads(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, heads, head width)."""
        return x.unflatten(-1, (self.heads, -1))

    def one_head(self, x: Tensor, head: int) -> Tensor:
        """(B, tokens, width) -> (B, tokens, 1, head width), fp32."""
        return self.of_heads(x)[:, :, head : head + 1].float()


Block = Callable[[Attend, AttentionShape, torch.device, torch.dtype, bool], str]


def _double_block(kernel: Attend, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """Text and image come from projections of their own, and their results go to projections of their own."""
    inputs = _Inputs.draw(shape, device, dtype, masked)
    sizes = [shape.text, shape.image]
    leaves = [
        [part.clone().requires_grad_() for part in x.split(sizes, dim=1)]
        for x in (inputs.query, inputs.key, inputs.value)
    ]
    query, key, value = (inputs.of_heads(torch.cat(parts, dim=1)) for parts in leaves)
    result = attend_heads(kernel, query, key, value, inputs.mask)
    flat = [leaf for parts in leaves for leaf in parts]
    gradients = torch.autograd.grad(result.split(sizes, dim=1), flat, inputs.gradient.split(sizes, dim=1))
    together = [torch.cat(gradients[i : i + 2], dim=1) for i in (0, 2, 4)]
    return _difference(inputs, result.detach(), together)


def _single_block(kernel: Attend, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """The result is joined with the feed-forward's, four times as wide, for one projection: its gradient comes back as a part."""
    inputs = _Inputs.draw(shape, device, dtype, masked)
    leaves = [x.clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    query, key = torch.stack([inputs.of_heads(leaf) for leaf in leaves[:2]]).unbind(0)
    value = inputs.of_heads(leaves[2])
    result = attend_heads(kernel, query, key, value, inputs.mask)
    widened = result.new_zeros(*result.shape[:2], 4 * result.shape[2])
    both = join(result, widened)
    gradient = torch.cat([inputs.gradient, widened], dim=2)
    return _difference(inputs, result.detach(), torch.autograd.grad(both, leaves, gradient))


def _difference(inputs: _Inputs, result: Tensor, gradients: Sequence[Tensor]) -> str:
    """'' where result and gradients are right, see kernel_fault. Compared on the first and the last head: a reference of all would take T^2 numbers each."""
    if not bool(result.isfinite().all()):
        return "its output is not finite"
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "its gradients are not finite"
    limit = FULL_ERROR if result.dtype in (torch.float32, torch.float64) else HALF_ERROR
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for head in {0, inputs.heads - 1}:
        right = _reference(inputs, head)
        for name, ours, exact in zip(names, (result, *gradients), right, strict=True):
            error = float((inputs.one_head(ours, head) - exact).norm() / exact.norm())
            if not error <= limit:
                return f"its {name} is off by {error:.2g} of its size"
    return ""


def _reference(inputs: _Inputs, head: int) -> list[Tensor]:
    """Output and gradients of one head by the slow kernel in fp32, (B, tokens, 1, head width) each."""
    query, key, value = (inputs.one_head(x, head).requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    result = attend_heads(attention("math", masked="math"), query, key, value, inputs.mask)
    gradients = torch.autograd.grad(result, [query, key, value], inputs.one_head(inputs.gradient, head).flatten(2))
    return [result.detach().unsqueeze(2), *gradients]
