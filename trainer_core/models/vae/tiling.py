"""Process an image in overlapping tiles that are blended where they overlap."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

OVERLAP = 4  # a quarter of a tile's edge


def in_tiles(compute: Callable[[Tensor], Tensor], x: Tensor, edge: int, scale: Fraction) -> Tensor:
    """Return compute(x), computed in tiles of at most `edge` x `edge`. If x is no larger, it is exactly compute(x).

    y = sum_i w_i y_i / sum_i w_i over the tiles i, where w_i decreases linearly towards a tile's edges.

    Args:
        compute: Maps (B, C, h, w) to (B, C', scale h, scale w).
        x: (B, C, H, W). H, W and edge times scale must be whole numbers.
        edge: Edge length of a tile.
        scale: Ratio of the result's edges to those of x.
    """
    height, width = x.shape[2:]
    if height <= edge and width <= edge:
        return compute(x)
    total, weight = torch.zeros(()), torch.zeros(())
    for top in starts(height, edge):
        for left in starts(width, edge):
            tile = compute(x[:, :, top : top + edge, left : left + edge])
            if not total.ndim:
                total = tile.new_zeros(*tile.shape[:2], int(height * scale), int(width * scale))
                weight = tile.new_zeros(total.shape[2:])
            fade = _ramp(tile.shape[2], tile)[:, None] * _ramp(tile.shape[3], tile)[None]
            rows = slice(int(top * scale), int(top * scale) + tile.shape[2])
            columns = slice(int(left * scale), int(left * scale) + tile.shape[3])
            total[:, :, rows, columns] += tile * fade
            weight[rows, columns] += fade
    return total / weight


def starts(length: int, edge: int) -> list[int]:
    """Return the start positions of tiles that cover `length` and overlap by a quarter. The last tile ends with it."""
    if length <= edge:
        return [0]
    stride = edge - edge // OVERLAP
    return [*range(0, length - edge, stride), length - edge]


def _ramp(length: int, like: Tensor) -> Tensor:
    """Return weights that are 1 in the middle and decrease to just above 0 over a quarter of the length at each end."""
    rise = max(1, length // OVERLAP)
    from_start = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(from_start, from_start.flip(0)).clamp(max=rise) / rise
