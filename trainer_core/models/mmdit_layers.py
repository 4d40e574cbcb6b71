"""What the blocks of Flux and Chroma are made of: attention over text and picture together, rotary positions, feed-forward.

Parameters have diffusers' names and order (its files load, and a LoRA's layers are drawn in the same order), but nothing
is imported from it: that import takes longer than all else before the first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .norm_rotate import turn_heads

# (query, key, value, mask) -> as query; (B, heads, tokens, width) each, mask None or boolean, broadcast to (B, heads, T, T).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(width)) value, by the kernel that torch finds best.

    On CUDA cuDNN's is left out: torch prefers it on new cards, where it was wrong (see Join). train/attention_choice.py chooses for training.
    """
    if query.device.type == "cuda":
        with sdpa_kernel(ON_CUDA):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


Made = TypeVar("Made", bound="FromConfig")


class FromConfig(nn.Module):
    """A module whose constructor takes the entries of a diffusers config.json."""

    config: dict[str, Any]  # what it was made from

    @classmethod
    def from_config(cls: type[Made], config: dict[str, Any]) -> Made:
        """From a config.json of diffusers; entries that are no argument are left out."""
        known = inspect.signature(cls).parameters
        model = cls(**{key: value for key, value in config.items() if key in known})
        model.config = dict(config)
        return model

    def restore_buffers_(self) -> None:
        """Compute anew what is in no file, and what a model built on the meta device therefore lacks."""


class RotaryPositions(nn.Module):
    """Angles of rotary positions: pair i of an axis turns by position * theta^(-2 i / width of the axis).

    Args:
        axes: width of each axis' share of a head, all even.
    Source: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(self, axes: Sequence[int], theta: float = 10000.0):
        super().__init__()
        self.axes, self.theta = tuple(axes), theta

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, axes) -> cosines and sines, (tokens, head width) fp32 each; each angle twice, for both of its pair."""
        places = ids.cpu().double()  # some devices have no fp64
        angles = torch.cat([self._angles(places[:, i], width) for i, width in enumerate(self.axes)], dim=1)
        cosines, sines = (part.repeat_interleave(2, dim=1).float() for part in (angles.cos(), angles.sin()))
        return cosines.to(ids.device), sines.to(ids.device)

    def _angles(self, places: Tensor, width: int) -> Tensor:
        speeds = 1.0 / self.theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        return torch.outer(places, speeds)


def split_positions(
    positions: tuple[Tensor, Tensor], num_text: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cosines and sines of the text's tokens, which come first, and of the image's."""
    cosines, sines = positions
    text = cosines[..., :num_text, :], sines[..., :num_text, :]
    return text, (cosines[..., num_text:, :], sines[..., num_text:, :])


def attend_heads(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of heads: (B, tokens, heads, head width) each -> (B, tokens, width).

    The kernel gets views, (B, heads, tokens, width) with the strides of (B, tokens, heads, width): nothing is copied.
    attention_check.py hands kernels the same.

    Args:
        mask: boolean (B, tokens), False is not attended; what the queries of such tokens take matters to nobody.
    """
    allowed = None if mask is None else mask[:, None, None, :]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return attend(query, key, value, allowed).transpose(1, 2).flatten(2)


class Join(torch.autograd.Function):
    """Two parts side by side, (B, tokens, a) and (B, tokens, b) -> (B, tokens, a + b); the first one's gradient is contiguous.

    Autograd's own gradient of a concatenation is a slice of the whole, whose rows are a + b apart. Attention kernels get it as
    they are, and cuDNN's backward reads it as if its rows were a apart: NaN, then reads beyond its end (H200, torch 2.11).
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.width = first.shape[2]
        return torch.cat([first, second], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient[..., : ctx.width].contiguous(), gradient[..., ctx.width :]


def join(attended: Tensor, widened: Tensor) -> Tensor:
    """What attention and feed-forward of a single block give, side by side. See Join."""
    return Join.apply(attended, widened)  # pyright: ignore[reportReturnType]


class SelfAttention(nn.Module):
    """Attention of all tokens to all, queries and keys normalised and turned by their positions.

    The result is not projected: single blocks project it together with their feed-forward part.

    Args:
        width: of tokens; heads * head_width.
    """

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width, self.attend = head_width, attend
        self.norm_q, self.norm_k = _norm(head_width), _norm(head_width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, tokens, width) -> the same."""
        query, key = self.heads(self.to_q(x)), self.heads(self.to_k(x))
        query, key = turn_heads(query, key, self.norm_q, self.norm_k, positions)
        return attend_heads(self.attend, query, key, self.heads(self.to_v(x)), mask)

    def heads(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, heads, head width)."""
        return x.unflatten(-1, (-1, self.head_width))


class JointAttention(SelfAttention):
    """Text and image tokens attend each other, each kind with projections of its own, of the result too."""

    def __init__(self, width: int, head_width: int):
        super().__init__(width, head_width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_added_q, self.norm_added_k = _norm(head_width), _norm(head_width)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_add_out = nn.Linear(width, width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image: Tensor, text: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Image (B, I, width) and text (B, T, width) -> what each took. Text comes first in positions and mask."""
        heads, num_text = self.heads, text.shape[1]
        of_text, of_image = split_positions(positions, num_text)
        text_query, text_key = turn_heads(
            heads(self.add_q_proj(text)), heads(self.add_k_proj(text)), self.norm_added_q, self.norm_added_k, of_text
        )
        image_query, image_key = turn_heads(
            heads(self.to_q(image)), heads(self.to_k(image)), self.norm_q, self.norm_k, of_image
        )
        query, key = torch.cat([text_query, image_query], dim=1), torch.cat([text_key, image_key], dim=1)
        value = heads(torch.cat([self.add_v_proj(text), self.to_v(image)], dim=1))
        joint = attend_heads(self.attend, query, key, value, mask)
        from_text, from_image = joint.split([num_text, image.shape[1]], dim=1)
        return self.to_out[0](from_image), self.to_add_out(from_text)


class FeedForward(nn.Module):
    """width -> 4 width -> width, GELU (tanh) between."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(_Widened(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Widened(nn.Module):
    """Holds a Linear under the name that it has in files."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, the norm without weights of its own. shift, scale: (B, 1, width)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def finite(x: Tensor) -> Tensor:
    """In fp16, sums of blocks can leave its range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-6)


class DoubleBlock(nn.Module):
    """Text and picture in streams of their own that attend each other."""

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
        """(text, image). rows: (B, 6, 1, width): shift, scale, gate of attention, then of the feed-forward part."""
        a, c = image_rows.unbind(1), text_rows.unbind(1)
        from_image, from_text = self.attn(modulate(image, a[0], a[1]), modulate(text, c[0], c[1]), positions, mask)
        image = torch.addcmul(image, a[2], from_image)
        image = torch.addcmul(image, a[5], self.ff(modulate(image, a[3], a[4])))
        text = torch.addcmul(text, c[2], from_text)
        text = torch.addcmul(text, c[5], self.ff_context(modulate(text, c[3], c[4])))
        return finite(text), image

    def unread_layers(
        self, image: Tensor, text: Tensor, image_rows: Tensor, text_rows: Tensor, *_: Any
    ) -> list[nn.Module]:
        """Layers whose results are gated and added to the block's, so that no gradient reads them; called as forward is."""
        if (
            image_rows.requires_grad or text_rows.requires_grad or image.dtype == torch.float16
        ):  # gates learn; finite() reads
            return []
        return [self.ff.net[2], self.ff_context.net[2]]


class SingleBlock(nn.Module):
    """One stream; attention and feed-forward side by side."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SelfAttention(width, head_width)

    def forward(
        self, joint: Tensor, rows: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """(B, tokens, width) -> the same. rows: (B, 3, 1, width): shift, scale, gate."""
        shift, scale, gate = rows.unbind(1)
        x = modulate(joint, shift, scale)
        both = join(self.attn(x, positions, mask), gelu(self.proj_mlp(x)))
        return finite(torch.addcmul(joint, gate, self.proj_out(both)))

    def unread_layers(self, joint: Tensor, rows: Tensor, *_: Any) -> list[nn.Module]:
        """See DoubleBlock.summed."""
        return [] if rows.requires_grad or joint.dtype == torch.float16 else [self.proj_out]
