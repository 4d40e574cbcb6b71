"""Latents <-> the sequence of image tokens, and where each token lies."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C): 2x2 patches, features in the order c, dh, dw."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H/2 * W/2, 4 C) -> (B, C, H, W); height and width are those of the latents."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(H/2 * W/2, 3): (0, y, x) of each image token, fp32."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(device, torch.float32)


def text_ids(num_tokens: int, device: torch.device | None = None) -> Tensor:
    """(num_tokens, 3): zeros, for text has no place in the picture."""
    return torch.zeros(num_tokens, 3, device=device)
