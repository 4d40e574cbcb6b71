"""Convert latents and text to token sequences, with position ids and attention masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Pack (B, C, H, W) into (B, H/2 * W/2, 4 C): 2x2 patches, with features in the order c, dh, dw."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack (B, H/2 * W/2, 4 C) into (B, C, H, W). height and width are those of the latents."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return (H/2 * W/2, 3): (0, y, x) of each image token, fp32."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
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
