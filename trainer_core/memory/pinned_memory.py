"""Pinned copies of many tensors, packed into a few chunks."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28  # while weights are copied, they take this much more RAM
ALIGNMENT = 64  # bytes


class PinnedMemory:
    """Allocates pinned memory from chunks whose sizes are powers of two.

    torch's allocator rounds each pinned allocation up to a power of two (torch 2.5 to 2.13): weights of 38 and 151 MB,
    pinned separately, take 64 and 256 MB. The tensors can share chunks, because they are all freed together.

    Args:
        total_bytes: Total size of all tensors to come, so that the last chunk is no larger than needed.
    """

    def __init__(self, total_bytes: int = 1 << 62):
        self._remaining = total_bytes
        self._free: list[Tensor] = []  # unused part of each chunk
        self.reserved_bytes = 0

    def copy_in(self, tensor: Tensor) -> Tensor:
        """Return a contiguous pinned copy of a host tensor."""
        return self.empty(tensor).copy_(tensor)

    def empty(self, tensor: Tensor) -> Tensor:
        """Return uninitialized pinned memory for a tensor of this shape and dtype, contiguous."""
        size = bytes_of(tensor)
        index = next((i for i, free in enumerate(self._free) if len(free) >= size), None)
        if index is None:
            index = len(self._free)
            self._free.append(self._new_chunk(max(min(self._remaining, CHUNK_BYTES), size)))
        chunk, self._free[index] = self._free[index], self._free[index][size:]
        self._remaining -= size
        raw = chunk[: tensor.numel() * tensor.element_size()]
        return raw.view(tensor.dtype).view(tensor.shape)

    def _new_chunk(self, num_bytes: int) -> Tensor:
        chunk = torch.empty(_power_of_two(num_bytes), dtype=torch.uint8, pin_memory=True)
        self.reserved_bytes += len(chunk)
        return chunk


def bytes_of(tensor: Tensor) -> int:
    """Return the size of a tensor in a chunk, in bytes."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
