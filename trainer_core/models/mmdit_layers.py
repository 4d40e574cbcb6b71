"""Layers of the Flux and Chroma blocks: joint attention over text and image tokens, rotary positions, feed-forward.

Parameters have diffusers' names and order: diffusers' files load, and LoRA layers are initialized in the same order.
Nothing is imported from diffusers, because that import takes longer than everything else before the first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .norm_rotate import turn_heads, turn_streams
from .projections import project

# (query, key, value, mask) -> a tensor like query. Each is (B, heads, tokens, width). The mask is None or boolean and
# broadcasts to (B, heads, T, T).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(query key^T / sqrt(width)) value, with the kernel that torch selects.

    On CUDA the cuDNN kernel is disabled: torch prefers it on new GPUs, where it returned wrong gradients (see Join).
    train/attention_choice.py selects the kernel for training.
    """
    if query.device.type == "cuda":
        with sdpa_kernel(ON_CUDA):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


ModuleT = TypeVar("ModuleT", bound="FromConfig")


class FromConfig(nn.Module):
    """A module whose constructor takes the entries of a diffusers config.json."""

    config: dict[str, Any]  # the config that the module was created from

    @classmethod
    def from_config(cls: type[ModuleT], config: dict[str, Any]) -> ModuleT:
        """Create a module from a diffusers config.json. Entries that are not constructor arguments are ignored."""
        parameters = inspect.signature(cls).parameters
        model = cls(**{key: value for key, value in config.items() if key in parameters})
        model.config = dict(config)
        return model

    def restore_buffers_(self) -> None:
        """Recompute the buffers that no file holds, which a model created on the meta device lacks."""


class RotaryPositions(nn.Module):
    """Rotary position embedding: pair i of an axis rotates by position * theta^(-2 i / width of the axis).

    Args:
        axes: Width of each axis' share of a head. All must be even.
        theta: Base of the frequencies.
    Source: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(self, axes: Sequence[int], theta: float = 10000.0):
        super().__init__()
        self.axes, self.theta = tuple(axes), theta

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map ids (tokens, axes) to cosines and sines, (tokens, head width) fp32 each, with every angle twice."""
        coordinates = ids.cpu().double()  # some devices have no fp64
        angles = torch.cat([self._angles(coordinates[:, i], width) for i, width in enumerate(self.axes)], dim=1)
        cosines, sines = (part.repeat_interleave(2, dim=1).float() for part in (angles.cos(), angles.sin()))
        return cosines.to(ids.device), sines.to(ids.device)

    def _angles(self, coordinates: Tensor, width: int) -> Tensor:
        speeds = 1.0 / self.theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        return torch.outer(coordinates, speeds)


def attend_heads(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Apply attention to heads: (B, tokens, heads, head width) each -> (B, tokens, width).

    The kernel receives views, (B, heads, tokens, width) with the strides of (B, tokens, heads, width); nothing is
    copied. attention_check.py passes the same strides to the kernels.

    Args:
        attend: The attention function.
        query: Queries, before rotation.
        key: Keys, before rotation.
        value: Values.
        positions: Cosines and sines, see RotaryPositions.
        mask: Boolean (B, tokens); False tokens are not attended to. The outputs at those tokens are not used.
    """
    allowed = None if mask is None else mask[:, None, None, :]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return attend(query, key, value, allowed).transpose(1, 2).flatten(2)


class Join(torch.autograd.Function):
    """Concatenate two tensors, (B, tokens, a) and (B, tokens, b); the first one's gradient is contiguous.

    Autograd's own gradient of a concatenation is a slice whose rows are a + b apart. It reaches the attention kernel
    with these strides, and cuDNN's backward reads it as if the rows were a apart: NaN, then out-of-bounds reads (H200,
    torch 2.11).
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.width = first.shape[2]
        return torch.cat([first, second], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient[..., : ctx.width].contiguous(), gradient[..., ctx.width :]


def join(attended: Tensor, widened: Tensor) -> Tensor:
    """Concatenate the attention and feed-forward outputs of a single block. See Join."""
    return Join.apply(attended, widened)  # pyright: ignore[reportReturnType]


class SelfAttention(nn.Module):
    """Self-attention over all tokens, with normalized queries and keys and rotary positions.

    The output is not projected: single blocks project it together with their feed-forward part.

    Args:
        width: Token width, heads * head_width.
        head_width: Width of one head.
    """

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width, self.attend = head_width, attend
        self.norm_q, self.norm_k = _norm(head_width), _norm(head_width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Map the outputs of to_q, to_k and to_v, (B, tokens, width) each, to the same shape."""
        query, key = turn_heads(self.heads(query), self.heads(key), self.norm_q, self.norm_k, positions)
        return attend_heads(self.attend, query, key, self.heads(value), mask)

    def heads(self, x: Tensor) -> Tensor:
        """Split (B, tokens, width) into heads: (B, tokens, heads, head width)."""
        return x.unflatten(-1, (-1, self.head_width))


class JointAttention(SelfAttention):
    """Joint attention over text and image tokens. Each modality has its own input and output projections."""

    def __init__(self, width: int, head_width: int):
        super().__init__(width, head_width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_added_q, self.norm_added_k = _norm(head_width), _norm(head_width)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_add_out = nn.Linear(width, width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image: Tensor, text: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Map image (B, I, width) and text (B, T, width) to (image, text). Text comes first in positions and mask."""
        heads, num_text = self.heads, text.shape[1]
        of_image, of_text = self.projections()
        text_query, text_key, text_value = project(of_text, text)
        image_query, image_key, image_value = project(of_image, image)
        query, key = turn_streams(
            (heads(text_query), heads(text_key), self.norm_added_q, self.norm_added_k),
            (heads(image_query), heads(image_key), self.norm_q, self.norm_k),
            positions,
        )
        value = heads(torch.cat([text_value, image_value], dim=1))
        joint = attend_heads(self.attend, query, key, value, mask)
        from_text, from_image = joint.split([num_text, image.shape[1]], dim=1)
        return self.to_out[0](from_image), self.to_add_out(from_text)

    def projections(self) -> list[list[nn.Module]]:
        """Return the layers that read the same input: the image's, and the text's."""
        return [[self.to_q, self.to_k, self.to_v], [self.add_q_proj, self.add_k_proj, self.add_v_proj]]


class FeedForward(nn.Module):
    """width -> 4 width -> width, with GELU (tanh) in between."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(_UpProjection(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _UpProjection(nn.Module):
    """Linear and GELU; the Linear has the name that it has in files."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return layer_norm(x) (1 + scale) + shift. The norm has no weights; shift and scale are (B, 1, width)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def finite(x: Tensor) -> Tensor:
    """Clip fp16 to its finite range, which sums of blocks can exceed."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-6)


class DoubleBlock(nn.Module):
    """Text and image tokens in separate streams, with joint attention."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.attn = JointAttention(width, head_width)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_rows: Tensor,
        text_rows: Tensor,
        positions: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (text, image).

        Args:
            image: (B, image tokens, width).
            text: (B, text tokens, width).
            image_rows: (B, 6, 1, width): shift, scale and gate of attention, then of the feed-forward part.
            text_rows: The same for text.
            positions: Cosines and sines of all tokens, text first.
            mask: None, or boolean over all tokens, text first.
        """
        a, c = image_rows.unbind(1), text_rows.unbind(1)
        from_image, from_text = self.attn(modulate(image, a[0], a[1]), modulate(text, c[0], c[1]), positions, mask)
        image = torch.addcmul(image, a[2], from_image)
        image = torch.addcmul(image, a[5], self.ff(modulate(image, a[3], a[4])))
        text = torch.addcmul(text, c[2], from_text)
        text = torch.addcmul(text, c[5], self.ff_context(modulate(text, c[3], c[4])))
        return finite(text), image

    def projections(self) -> list[list[nn.Module]]:
        """Return the layers that read the same input."""
        return self.attn.projections()

    def unread_layers(
        self, image: Tensor, text: Tensor, image_rows: Tensor, text_rows: Tensor, *_: Any
    ) -> list[nn.Module]:
        """Return the layers whose outputs are only gated and added, so no gradient reads them. Call like forward."""
        # The gradient of a trained gate reads the layer's output, and so does finite().
        if image_rows.requires_grad or text_rows.requires_grad or image.dtype == torch.float16:
            return []
        return [self.ff.net[2], self.ff_context.net[2]]


class SingleBlock(nn.Module):
    """One stream of tokens, with attention and feed-forward in parallel."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SelfAttention(width, head_width)

    def forward(
        self, joint: Tensor, rows: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Map (B, tokens, width) to the same shape. rows: (B, 3, 1, width): shift, scale, gate."""
        shift, scale, gate = rows.unbind(1)
        x = modulate(joint, shift, scale)
        (of_joint,) = self.projections()
        query, key, value, widened = project(of_joint, x)
        both = join(self.attn(query, key, value, positions, mask), gelu(widened))
        return finite(torch.addcmul(joint, gate, self.proj_out(both)))

    def projections(self) -> list[list[nn.Module]]:
        """Return the layers that read the same input."""
        return [[self.attn.to_q, self.attn.to_k, self.attn.to_v, self.proj_mlp]]

    def unread_layers(self, joint: Tensor, rows: Tensor, *_: Any) -> list[nn.Module]:
        """See DoubleBlock.unread_layers."""
        return [] if rows.requires_grad or joint.dtype == torch.float16 else [self.proj_out]
