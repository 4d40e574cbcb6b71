"""Pinned copies of many tensors, close together."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30
ALIGNMENT = 64  # bytes


class PinnedMemory:
    """Gives out pinned memory from chunks whose sizes are powers of two.

    torch's allocator rounds what is asked for up to the next of those (2.5 to 2.13): weights of 38 and 151 MB, pinned one by one, take 64
    and 256. Where the tensors are pinned matters to nobody: they are read, and all are freed together.

    Args:
        total_bytes: of all that will come, so that the last chunk is no larger than it must.
    """

    def __init__(self, total_bytes: int):
        self._left, self._chunk, self._used = total_bytes, torch.empty(0, dtype=torch.uint8), 0
        self.reserved_bytes = 0

    def copy_in(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor of the host."""
        size = bytes_of(tensor)
        if self._used + size > len(self._chunk):
            wanted = max(min(self._left, CHUNK_BYTES), size)
            self._chunk, self._used = torch.empty(_power_of_two(wanted), dtype=torch.uint8, pin_memory=True), 0
            self.reserved_bytes += len(self._chunk)
        raw = self._chunk[self._used : self._used + tensor.numel() * tensor.element_size()]
        self._used, self._left = self._used + size, self._left - size
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def bytes_of(tensor: Tensor) -> int:
    """What it takes there."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
