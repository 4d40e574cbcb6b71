"""Check that an attention kernel is correct on a device, with the inputs that this model's blocks pass to it.

A kernel that runs can still be wrong: cuDNN's returned NaN in every gradient, then illegal memory accesses, for the
strides that a single block's backward pass hands it, although it was correct on contiguous tensors (H200, torch 2.11,
bf16). A kernel is therefore checked before it is used for training. The check uses random inputs in the model's dtype,
the run's own token counts, the strides that blocks pass, and the join or split after the kernel. It compares outputs
and gradients with the math kernel in fp32.
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

# Limits of the error relative to the reference. bf16 rounds by 2^-9: correct kernels had an error of 0.004 (H200). In
# fp32, products may run in TF32.
HALF_ERROR, FULL_ERROR = 0.03, 0.005
MAX_BATCH = 2  # two samples have the strides of any batch


@dataclass(frozen=True)
class AttentionShape:
    """Input shape of one attention call.

    Attributes:
        batch: Samples.
        text: Text tokens.
        image: Image tokens.
        heads: Heads; 24 in Chroma and Flux.
        head_width: Width of one head; 128 in Chroma and Flux.
    """

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
    """Return what is wrong with this kernel's outputs or gradients in a double or single block, or '' if nothing.

    Args:
        name: See attention_backends.attention.
        shape: Input shape.
        device: Device of the check.
        dtype: Dtype of the inputs.
        masked: Use a mask that excludes some text tokens of the first sample.
    Raises:
        torch.OutOfMemoryError: Not enough memory for the check.
    """
    kernel = attention(name, masked=name)
    for block in (_double_block, _single_block):
        reasons: list[warnings.WarningMessage] = []
        try:
            # torch warns why a kernel refuses its inputs.
            with warnings.catch_warnings(record=True) as reasons, torch.enable_grad():
                warnings.simplefilter("always")
                fault = block(kernel, shape, device, dtype, masked)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warning_texts = [str(entry.message).splitlines()[0] for entry in reasons if "kernel" in str(entry.message)]
            return f"does not run ({'; '.join([reason_of(error), *warning_texts[-1:]])})"
        if fault:
            return fault
    return ""


@dataclass(frozen=True)
class _Inputs:
    """Random inputs of one block's attention.

    Attributes:
        query: (B, tokens, heads * head width), as are key, value and gradient.
        key: Keys.
        value: Values.
        gradient: Gradient of the output.
        mask: None, or boolean (B, tokens).
        heads: Number of heads.
    """

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
        # Queries and keys are normalized to size 1 per feature; values and gradients may have any size.
        query, key, value, gradient = (torch.randn(size, generator=source, device=device).to(dtype) for _ in range(4))
        mask = None
        if masked:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
            mask[0, shape.text // 2 : shape.text] = False
        return cls(query, key, value, gradient, mask, shape.heads)

    def of_heads(self, x: Tensor) -> Tensor:
        """Split (B, tokens, width) into heads: (B, tokens, heads, head width)."""
        return x.unflatten(-1, (self.heads, -1))

    def one_head(self, x: Tensor, head: int) -> Tensor:
        """Select one head of (B, tokens, width): (B, tokens, 1, head width), fp32."""
        return self.of_heads(x)[:, :, head : head + 1].float()


Block = Callable[[Attend, AttentionShape, torch.device, torch.dtype, bool], str]


def _double_block(kernel: Attend, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """Check a double block: text and image have separate projections before and after attention."""
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
    merged = [torch.cat(gradients[i : i + 2], dim=1) for i in (0, 2, 4)]
    return _difference(inputs, result.detach(), merged)


def _single_block(kernel: Attend, shape: AttentionShape, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """Check a single block: the output is joined with the 4x wider feed-forward output, so its gradient is a slice."""
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
    """Return what is wrong with the result or gradients, or '' if nothing, see kernel_fault.

    Only the first and the last head are compared: a reference of all heads would need T^2 elements for each.
    """
    if not bool(result.isfinite().all()):
        return "its output is not finite"
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "its gradients are not finite"
    limit = FULL_ERROR if result.dtype in (torch.float32, torch.float64) else HALF_ERROR
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for head in {0, inputs.heads - 1}:
        references = _reference(inputs, head)
        for name, ours, exact in zip(names, (result, *gradients), references, strict=True):
            error = float((inputs.one_head(ours, head) - exact).norm() / exact.norm())
            if not error <= limit:
                return f"its {name} is off by {error:.2g} of its size"
    return ""


def _reference(inputs: _Inputs, head: int) -> list[Tensor]:
    """Return one head's output and gradients from the math kernel in fp32, (B, tokens, 1, head width) each."""
    query, key, value = (inputs.one_head(x, head).requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    result = attend_heads(attention("math", masked="math"), query, key, value, inputs.mask)
    gradients = torch.autograd.grad(result, [query, key, value], inputs.one_head(inputs.gradient, head).flatten(2))
    return [result.detach().unsqueeze(2), *gradients]
