"""Convert latents and text to token sequences, with position ids and attention masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """Pack (B, C, H, W) into (B, H/p * W/p, p p C): patches of edge p, with features in the order c, dh, dw."""
    batch, channels, height, width = latents.shape
    rows, columns = height // patch, width // patch
    patches = latents.reshape(batch, channels, rows, patch, columns, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Unpack (B, H/p * W/p, p p C) into (B, C, H, W). height and width are those of the latents."""
    batch, _, features = tokens.shape
    channels = features // (patch * patch)
    patches = tokens.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(height: int, width: int, device: torch.device | None = None, patch: int = 2) -> Tensor:
    """Return (H/p * W/p, 3): (0, y, x) of each image token, fp32."""
    rows, columns = torch.arange(height // patch), torch.arange(width // patch)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(device, torch.float32)


def batch_text(text: Sequence[Tensor], num_image_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Batch embeddings of different lengths, and return the attention mask.

    Equal lengths need no mask, so flash attention stays available. Otherwise each sample attends to its own text tokens
    and to all image tokens. The mask is boolean, because a float mask would be added to the logits.

    Args:
        text: B tensors (tokens, width), each with k real tokens and one pad token.
        num_image_tokens: Number of image tokens.
    Returns:
        (B, longest, width), and None or a boolean (B, longest + num_image_tokens), True for tokens to attend to.
    """
    lengths = [len(tokens) for tokens in text]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(text)), None
    batch = text[0].new_zeros(len(text), longest, text[0].shape[1])
    mask = torch.ones(len(text), longest + num_image_tokens, dtype=torch.bool, device=text[0].device)
    for i, tokens in enumerate(text):
        batch[i, : len(tokens)] = tokens
        mask[i, len(tokens) : longest] = False
    return batch, mask
