"""T5's encoder: blocks of attention with learned relative position biases, and gated feed-forward layers.

Parameters have transformers' names, so that its files load; tests/models/t5/test_text_encoder.py compares the two.
Nothing is imported from transformers: that takes longer than encoding a small dataset's captions.

Source: Raffel et al. 2020, arXiv:1910.10683; version 1.1 (gated GELU, no shared output).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..meta_embedding import Embedding

FP16_MARGIN = 1000  # subtracted from fp16's largest finite value


class T5Encoder(nn.Module):
    """Maps token ids to embeddings.

    Args:
        config: transformers' config.json of a T5 model.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        if config.get("feed_forward_proj", "relu") != "gated-gelu":
            feed_forward = config.get("feed_forward_proj", "relu")
            raise UserError.at(
                "text_encoder", f"is a T5 with {feed_forward!r} feed-forward layers; use a T5 v1.1 ('gated-gelu')"
            )
        self.shared = Embedding(config["vocab_size"], config["d_model"])
        self.encoder = _Stack(config, self.shared)

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        """Map ids (B, tokens) and a boolean mask (B, tokens) to (B, tokens, width) in the model's dtype.

        Masked tokens still get a row.
        """
        return self.encoder(ids, attended)


class _Stack(nn.Module):
    def __init__(self, config: dict[str, Any], table: nn.Embedding):
        super().__init__()
        self.embed_tokens = table
        self.block = nn.ModuleList(_Block(config, has_distances=i == 0) for i in range(config["num_layers"]))
        self.final_layer_norm = _Norm(config)

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        first: Any = self.block[0]
        bias = (
            first.layer[0].SelfAttention.distances(ids.shape[1]).to(x.device)
        )  # the block may be offloaded to the host
        bias = bias.masked_fill(~attended[:, None, None, :], torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class _Block(nn.Module):
    def __init__(self, config: dict[str, Any], has_distances: bool):
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, has_distances), _FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layer:
            x = _finite(x + layer(x, bias))
        return x


class _AttentionLayer(nn.Module):
    def __init__(self, config: dict[str, Any], has_distances: bool):
        super().__init__()
        self.SelfAttention, self.layer_norm = _Attention(config, has_distances), _Norm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.SelfAttention(self.layer_norm(x), bias)


class _Attention(nn.Module):
    """softmax(q k^T + bias) v. There is no division by sqrt(width); T5's initialization accounts for it."""

    def __init__(self, config: dict[str, Any], has_distances: bool):
        super().__init__()
        self.num_heads, self.num_buckets = config["num_heads"], config["relative_attention_num_buckets"]
        self.max_distance = config.get("relative_attention_max_distance", 128)
        width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if has_distances:
            self.relative_attention_bias = Embedding(self.num_buckets, self.num_heads)

    def distances(self, num_tokens: int) -> Tensor:
        """Return each head's bias for each pair of positions, (1, heads, tokens, tokens)."""
        positions = torch.arange(num_tokens, device=self.relative_attention_bias.weight.device)
        buckets = distance_buckets(positions[None] - positions[:, None], self.num_buckets, self.max_distance)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(attention.transpose(1, 2).flatten(2))


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.DenseReluDense, self.layer_norm = _Gated(config), _Norm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.DenseReluDense(self.layer_norm(x))


class _Gated(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, inner = config["d_model"], config["d_ff"]
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(inner.to(self.wo.weight.dtype))  # in fp32 where the rest is fp16


class _Norm(nn.Module):
    """Root mean square norm, computed in at least fp32. Subtracts no mean and adds no bias."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config["d_model"]))
        self.epsilon = config.get("layer_norm_epsilon", 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(self.weight.dtype)


def distance_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket indices of signed distances.

    Each sign has half of the buckets. Near distances have their own bucket, far ones share buckets on a logarithmic
    scale.
    """
    half = num_buckets // 2
    exact = half // 2
    far = distances.abs()
    steps = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    bucket = (exact + steps.long()).clamp(max=half - 1)
    return half * (distances > 0).long() + torch.where(far < exact, far, bucket)


def _finite(x: Tensor) -> Tensor:
    """Clamp fp16 to its finite range, which sums may exceed."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - FP16_MARGIN
    return x.clamp(-limit, limit)
