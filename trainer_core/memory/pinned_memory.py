"""Pinned copies of many tensors, packed into a few chunks."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30
ALIGNMENT = 64  # bytes


class PinnedMemory:
    """Allocates pinned memory from chunks whose sizes are powers of two.

    torch's allocator rounds each pinned allocation up to a power of two (torch 2.5 to 2.13): weights of 38 and 151 MB,
    pinned separately, take 64 and 256 MB. The tensors can share chunks, because they are read-only and all freed
    together.

    Args:
        total_bytes: Total size of all tensors to come, so that the last chunk is no larger than needed.
    """

    def __init__(self, total_bytes: int):
        self._remaining, self._chunk, self._used = total_bytes, torch.empty(0, dtype=torch.uint8), 0
        self.reserved_bytes = 0

    def copy_in(self, tensor: Tensor) -> Tensor:
        """Return a contiguous pinned copy of a host tensor."""
        size = bytes_of(tensor)
        if self._used + size > len(self._chunk):
            chunk_bytes = max(min(self._remaining, CHUNK_BYTES), size)
            self._chunk, self._used = torch.empty(_power_of_two(chunk_bytes), dtype=torch.uint8, pin_memory=True), 0
            self.reserved_bytes += len(self._chunk)
        raw = self._chunk[self._used : self._used + tensor.numel() * tensor.element_size()]
        self._used, self._remaining = self._used + size, self._remaining - size
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def bytes_of(tensor: Tensor) -> int:
    """Return the size of a tensor in a chunk, in bytes."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
