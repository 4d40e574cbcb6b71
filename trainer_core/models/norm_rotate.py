"""RMSNorm and rotary positions of queries and keys as one operation, with a gradient of its own.

    n = x / sqrt(mean(x^2) + eps),   y = R (w n),   R turns each pair of features by its position's angle

Apart, the two take 8 and 3 small kernels forward for queries and as many for keys, and about 36 backward, in every
block: 3,270 of the 13,516 that a step of Chroma launches while the GPU waits for the host (docs/decisions/0035). Here
queries and keys go through together, in fp32 from the norm to the end of the rotation: one rounding to bf16 instead of
two. What the backward pass needs is x as it came, and one number a row; torch's own keeps fp32 copies.

    dL/dn = w R^T g,   dL/dx = (dL/dn - n mean(n dL/dn)) / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMPLEX_DEVICES = frozenset({"cpu", "cuda", "meta"})  # meta: what is counted is what runs (planner/meta_counter.py)
FUSED_NORMS = frozenset({"cuda"})  # torch has RMSNorm and its gradient as one kernel each there


def turn_heads(
    query: Tensor, key: Tensor, norm_q: nn.RMSNorm, norm_k: nn.RMSNorm, positions: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, tokens, heads, head width) each, normalized and turned by their positions: the same shapes.

    On CUDA by torch's fused norm: in plain operators norm_rotate reads and writes fp32 a dozen times there.
    """
    if query.device.type in FUSED_NORMS or torch.compiler.is_compiling():
        return rotate(norm_q(query), positions), rotate(norm_k(key), positions)
    weight = torch.stack([norm_q.weight, norm_k.weight])
    assert norm_q.eps is not None and norm_q.eps == norm_k.eps
    query, key = norm_rotate(torch.stack([query, key]), weight, positions, norm_q.eps).unbind(0)
    return query, key


# Queries and keys of one stream, (B, tokens, heads, head width) each, and the norm of each.
Stream = tuple[Tensor, Tensor, nn.RMSNorm, nn.RMSNorm]


def turn_streams(text: Stream, image: Stream, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return queries and keys of both streams, the text's tokens first, as turn_heads does.

    Args:
        positions: of all tokens, see norm_rotate.
    """
    if text[0].device.type in FUSED_NORMS or torch.compiler.is_compiling():
        (text_query, text_key, text_norm_q, text_norm_k), (image_query, image_key, norm_q, norm_k) = text, image
        query = torch.cat([text_norm_q(text_query), norm_q(image_query)], dim=1)
        key = torch.cat([text_norm_k(text_key), norm_k(image_key)], dim=1)
        return rotate(query, positions), rotate(key, positions)
    num_text = text[0].shape[1]
    cosines, sines = positions
    of_text = turn_heads(*text, (cosines[..., :num_text, :], sines[..., :num_text, :]))
    of_image = turn_heads(*image, (cosines[..., num_text:, :], sines[..., num_text:, :]))
    query, key = (torch.cat(both, dim=1) for both in zip(of_text, of_image, strict=True))
    return query, key


def rotate(x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of a head's features by its position's angle, in fp32. x: (B, tokens, heads, width). positions: see norm_rotate."""
    cosines, sines = (part[..., None, ::2] for part in positions)
    return _turn(_wide(x), cosines, sines).to(x.dtype)


def norm_rotate(x: Tensor, weight: Tensor, positions: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Normalize each head's features, and turn them by their positions.

    Args:
        x: (parts, B, tokens, heads, width); parts are queries and keys.
        weight: of the norm, (parts, width). Frozen: it gets no gradient here.
        positions: cosines and sines, (tokens, width) or (B, tokens, width) each, see RotaryPositions.
        eps: added to the mean square.
    Returns:
        The same shape and dtype, contiguous.
    """
    cosines, sines = (part[..., None, ::2] for part in positions)
    weight = weight[:, None, None, None]
    if weight.requires_grad:
        wide, size = _measure(x, eps)
        return _turn(wide * size * weight, cosines, sines).to(x.dtype)
    return _NormRotate.apply(x, weight, cosines, sines, eps)  # pyright: ignore[reportReturnType]


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cosines: Tensor, sines: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide, size = _measure(x, eps)
        ctx.save_for_backward(x, size, weight, cosines, sines)
        return _turn((wide * size).mul_(weight), cosines, sines).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, size, weight, cosines, sines = ctx.saved_tensors
        of_norm = _turn(_wide(gradient), cosines, -sines) * weight
        norm = _wide(x) * size
        along = (norm * of_norm).mean(-1, keepdim=True)
        of_x = torch.addcmul(of_norm, norm, along, value=-1.0).mul_(size)
        return of_x.to(x.dtype), None, None, None, None


def _measure(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x in at least fp32, and 1 / sqrt(mean(x^2) + eps) of each row."""
    wide = _wide(x)
    return wide, torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (a, b) of features: (a + ib) (cos + i sin), in x's precision.

    One complex product where the device has them, 2.5 times as fast as four real ones on a CPU; compilers can't fuse
    those, so real ones for them.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if x.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        angles = torch.complex(cosines.to(x.dtype), sines.to(x.dtype))
        return torch.view_as_real(torch.view_as_complex(pairs) * angles).flatten(-2)
    a, b = pairs.unbind(-1)
    return torch.stack([a * cosines - b * sines, b * cosines + a * sines], dim=-1).flatten(-2)
