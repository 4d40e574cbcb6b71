"""CLIP-L's text encoder, only for its pooled output: one vector for the whole prompt.

Parameters have transformers' names; tests/models/flux/test_text_encoder.py compares the two. Nothing is imported from
transformers.

Source: Radford et al. 2021, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..meta_embedding import Embedding


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the GELU approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipText(nn.Module):
    """Maps token ids to a pooled embedding.

    Args:
        config: transformers' config.json of a CLIPTextModel.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError.at(
                "text_encoder",
                f"is a CLIP with activation {config['hidden_act']!r}; supported are {', '.join(ACTIVATIONS)}",
            )
        self.embeddings = _Embeddings(config)
        self.encoder = _Stack(config)
        self.final_layer_norm = _norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, tokens), with the end token last and no pads, to (B, width).

        Attention is causal, so pads after the end token would change nothing.
        """
        return self.final_layer_norm(self.encoder(self.embeddings(ids))[:, -1])


class _Embeddings(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.token_embedding = Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class _Stack(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.self_attn, self.layer_norm1 = _Attention(config), _norm(config)
        self.mlp, self.layer_norm2 = _FeedForward(config), _norm(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, self.num_heads = config["hidden_size"], config["num_attention_heads"]
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.act = ACTIVATIONS[config["hidden_act"]]
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _norm(config: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-5))
